package debian

import (
	"os"
	"path/filepath"
	"testing"
)

func TestHostSources(t *testing.T) {
	const stanza = `# a comment
Types: deb deb-src
URIs: http://mirror.example/debian
Suites: bookworm bookworm-updates
# another
Components: main
 contrib
Signed-By: /usr/share/keyrings/debian-archive-keyring.gpg

Types: deb
URIs: http://mirror.example/debian-security
Suites: bookworm-security
Components: main
`
	const want = "deb [signed-by=/usr/share/keyrings/debian-archive-keyring.gpg] http://mirror.example/debian bookworm main\n" +
		"deb [signed-by=/usr/share/keyrings/debian-archive-keyring.gpg] http://mirror.example/debian bookworm-updates main\n" +
		"deb http://mirror.example/debian-security bookworm-security main\n"
	tests := []struct {
		name  string
		files map[string]string
		want  string
	}{
		{"none", nil, ""},
		{"deb822", map[string]string{"sources.list.d/debian.sources": stanza}, want},
		{"disabled", map[string]string{"sources.list.d/debian.sources": "Enabled: no\n" + stanza},
			""}, // security alone is no archive
		{"one line", map[string]string{"sources.list": `
# deb http://off.example/debian bookworm main
deb http://a.example/debian bookworm main contrib # here
deb [arch=amd64 signed-by=/k/debian-archive-keyring.gpg] http://b.example/debian bookworm-updates main
deb-src http://c.example/debian bookworm main
deb cdrom:[Debian]/ bookworm
`}, "deb [signed-by=/k/debian-archive-keyring.gpg] http://b.example/debian bookworm-updates main\n" +
			"deb http://a.example/debian bookworm main\n"},
		{"others", map[string]string{
			"sources.list":             "deb http://ubuntu.example/ubuntu noble main\ndeb http://x.example bookworm stable\n",
			"sources.list.d/a.sources": "Types: deb\nURIs: https://y.example\nSuites: bookworm\nComponents: main\nSigned-By:\n -----BEGIN PGP PUBLIC KEY BLOCK-----\n .\n abc\n",
			"sources.list.d/b.list":    "deb [signed-by=/k/vendor.gpg] https://z.example bookworm main\n",
			"sources.list.d/c.save":    "deb http://w.example/debian bookworm main\n",
		}, ""},
		{"twice", map[string]string{
			"sources.list":          "deb http://a.example/debian bookworm main\n",
			"sources.list.d/a.list": "deb http://a.example/debian bookworm main\n",
		}, "deb http://a.example/debian bookworm main\n"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			dir := t.TempDir()
			for name, text := range tt.files {
				name = filepath.Join(dir, name)
				if err := os.MkdirAll(filepath.Dir(name), 0o755); err != nil {
					t.Fatal(err)
				}
				if err := os.WriteFile(name, []byte(text), 0o644); err != nil {
					t.Fatal(err)
				}
			}
			got, err := hostSources(dir)
			if err != nil || got != tt.want {
				t.Errorf("got %q, %v, want %q", got, err, tt.want)
			}
		})
	}
}
