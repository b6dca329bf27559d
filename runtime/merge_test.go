package runtime

import (
	"slices"
	"strings"
	"testing"
)

func TestMerge(t *testing.T) {
	t.Setenv("FROM_CALLER", "yes")
	image := ImageConfig{Entrypoint: []string{"/init", "-x"}, Cmd: []string{"serve"}, Env: []string{"A=1", "B=2", "rubbish"},
		User: "bob", WorkingDir: "srv", StopSignal: "SIGQUIT"}
	sh, none := "sh", ""
	for _, c := range []struct {
		name  string
		image ImageConfig
		flags Flags
		args  string
		env   string
	}{
		{"image's own", image, Flags{}, "/init -x serve", "A=1 B=2"},
		{"command", image, Flags{Args: []string{"ls", "-l"}}, "/init -x ls -l", "A=1 B=2"},
		{"entrypoint", image, Flags{Entrypoint: &sh}, "sh", "A=1 B=2"},
		{"entrypoint and command", image, Flags{Entrypoint: &sh, Args: []string{"-c", "ls"}}, "sh -c ls", "A=1 B=2"},
		{"no entrypoint", image, Flags{Entrypoint: &none, Args: []string{"ls"}}, "ls", "A=1 B=2"},
		{"no entrypoint in the image", ImageConfig{Cmd: []string{"x"}}, Flags{}, "x", ""},
		{"environment", image, Flags{Env: []string{"A=3", "C=4=5", "FROM_CALLER", "NOT_IN_CALLER"}}, "/init -x serve", "A=3 B=2 C=4=5 FROM_CALLER=yes"},
	} {
		got, err := Merge(c.image, c.flags)
		if err != nil {
			t.Errorf("%s: %v", c.name, err)
			continue
		}
		if a, e := strings.Join(got.Args, " "), strings.Join(got.Env, " "); a != c.args || e != c.env {
			t.Errorf("%s: %q %q, want %q %q", c.name, a, e, c.args, c.env)
		}
	}
	got, err := Merge(image, Flags{User: "0", WorkingDir: "/w/../v"})
	if err != nil || got.User != "0" || got.Cwd != "/v" || got.StopSignal != "SIGQUIT" {
		t.Errorf("%+v, %v", got, err)
	}
	if got, _ := Merge(image, Flags{}); got.User != "bob" || got.Cwd != "/srv" {
		t.Errorf("%+v", got)
	}
	if !slices.Equal(image.Env, []string{"A=1", "B=2", "rubbish"}) {
		t.Errorf("Merge changed the image's: %v", image.Env)
	}
	for name, f := range map[string]Flags{
		"no command":         {Entrypoint: &none},
		"relative directory": {WorkingDir: "x"},
		"nameless variable":  {Env: []string{"=x"}},
		"NUL":                {Args: []string{"a\x00b"}},
		"signal":             {StopSignal: "SIGNONE"},
	} {
		if got, err := Merge(image, f); err == nil {
			t.Errorf("%s: %+v", name, got)
		}
	}
}

func TestParseMount(t *testing.T) {
	for in, want := range map[string]Mount{
		"/a:/b":        {"/a", "/b", false},
		"/a/:/b/../c/": {"/a", "/c", false},
		"/a:/b:ro":     {"/a", "/b", true},
		"/a:/b:rw":     {"/a", "/b", false},
	} {
		if got, err := ParseMount(in); err != nil || got != want {
			t.Errorf("%q: %+v, %v", in, got, err)
		}
	}
	for _, in := range []string{"", "/a", "/a:", "/a:b", ":/b", "/a:/b:xy", "/a:/b:ro:z", "/a:/", "name:/b"} {
		if got, err := ParseMount(in); err == nil {
			t.Errorf("%q: %+v", in, got)
		}
	}
}

func TestParseBytes(t *testing.T) {
	for in, want := range map[string]int64{"1": 1, "512m": 512 << 20, "2G": 2 << 30, "3kb": 3 << 10, "7b": 7, "1t": 1 << 40} {
		if got, err := ParseBytes(in); err != nil || got != want {
			t.Errorf("%q: %d, %v", in, got, err)
		}
	}
	for _, in := range []string{"", "m", "-1", "0", "1.5g", "1mm", "9999999999g", "1 m", "4611686018427387905"} {
		if got, err := ParseBytes(in); err == nil {
			t.Errorf("%q: %d", in, got)
		}
	}
}

func TestStopSignal(t *testing.T) {
	for in, want := range map[string]int{"": 15, "SIGINT": 2, "quit": 3, "9": 9, "SIGRTMIN+3": 37, "RTMAX-1": 63, "RTMIN": 34} {
		if got, err := stopSignal(in); err != nil || int(got) != want {
			t.Errorf("%q: %d, %v", in, got, err)
		}
	}
	for _, in := range []string{"0", "65", "-1", "SIGX", "SIGRTMIN+99", "SIGRTMIN+", "SIGRTMAX-99", "SIGRTMIN+3x"} {
		if got, err := stopSignal(in); err == nil {
			t.Errorf("%q: %d", in, got)
		}
	}
}
