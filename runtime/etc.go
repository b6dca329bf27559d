package runtime

import (
	"bytes"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
)

// etcFiles are bound over the image's files of the same names in /etc. They
// are the container's own copies: it may write them.
var etcFiles = []string{"resolv.conf", "hosts", "hostname"}

const localHosts = "127.0.0.1\tlocalhost\n::1\tlocalhost ip6-localhost ip6-loopback\n"

// writeEtc makes etcFiles in the bundle's directory: with the host's network
// the host's own, else ones that name this machine only.
func writeEtc(dir, hostname string, network Network) error {
	resolv, hosts := []byte(nil), []byte(localHosts)
	if network != None {
		var err error
		if resolv, err = hostFile("/etc/resolv.conf"); err != nil {
			return err
		}
		if hosts, err = hostFile("/etc/hosts"); err != nil {
			return err
		}
	}
	if !namesHost(hosts, hostname) {
		if len(hosts) > 0 && hosts[len(hosts)-1] != '\n' {
			hosts = append(hosts, '\n')
		}
		hosts = fmt.Appendf(hosts, "127.0.1.1\t%s\n", hostname)
	}
	for i, data := range [][]byte{resolv, hosts, []byte(hostname + "\n")} {
		name := filepath.Join(dir, etcFiles[i])
		if err := os.WriteFile(name, data, 0o644); err != nil {
			return err
		}
		if err := os.Chmod(name, 0o644); err != nil { // whatever the umask
			return err
		}
	}
	return nil
}

// namesHost tells whether a hosts file has the name.
func namesHost(hosts []byte, name string) bool {
	for line := range bytes.Lines(hosts) {
		text, _, _ := strings.Cut(string(line), "#")
		f := strings.Fields(text)
		for _, n := range f[min(1, len(f)):] {
			if n == name {
				return true
			}
		}
	}
	return false
}

// hostFile reads a small file of the host; a missing one is empty.
func hostFile(name string) ([]byte, error) {
	f, err := os.Open(name)
	if os.IsNotExist(err) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	defer f.Close()
	return io.ReadAll(io.LimitReader(f, 1<<20))
}
