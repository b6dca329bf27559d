package e2e

import "testing"

// form is a way in which a node may get the same image.
type form struct {
	what    string
	name    string   // in the registry
	args    []string // for the verbs that pull
	lazy    bool
	percent int64 // of the image, at most fetched for a first start of Python
}

var forms = []form{
	{what: "converted", name: name, lazy: true, percent: 10},
	{what: "indexed", name: plainName, lazy: true, percent: 12},
	{what: "read", name: plainName, args: []string{"--index-trust", "local"}},
}

// eachForm runs a test for each form of the image, each way to show it.
func eachForm(t *testing.T, test func(t *testing.T, f form, face string)) {
	for _, f := range forms {
		t.Run(f.what, func(t *testing.T) {
			for _, face := range []string{"device", "fanotify", "fuse", "direct"} {
				t.Run(face, func(t *testing.T) { test(t, f, face) })
			}
		})
	}
}

// complete fetches all of an image that the kernel is to read by itself.
func (n *node) complete(f form, face, host string) {
	n.t.Helper()
	if face == "direct" {
		n.shale(0, append(append([]string{"pull", "-q", "--complete"}, f.args...), host+"/"+f.name)...)
	}
}

// mount mounts a form of the image.
func (n *node) mount(f form, face, host string) {
	n.t.Helper()
	n.complete(f, face, host)
	n.shale(0, append(append([]string{"mount", "--face", face}, f.args...), host+"/"+f.name, n.mnt)...)
}
