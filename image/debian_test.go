package image_test

import (
	"bufio"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"testing"
)

var listening = regexp.MustCompile(`msg="listening on (127\.0\.0\.1:[0-9]+)"`)

// debianRegistry starts Debian's docker-registry, with more configuration, on
// a free loopback port, and returns its host:port.
func debianRegistry(t *testing.T, extra string) string {
	t.Helper()
	program, err := exec.LookPath("docker-registry")
	if err != nil {
		t.Skip("docker-registry is not installed (Debian: apt install docker-registry)")
	}
	dir := t.TempDir()
	conf := filepath.Join(dir, "config.yml")
	text := fmt.Sprintf("version: 0.1\nlog: {level: info, accesslog: {disabled: true}}\nstorage:\n  filesystem: {rootdirectory: %s}\nhttp: {addr: 127.0.0.1:0}\n%s", filepath.Join(dir, "data"), extra)
	if err := os.WriteFile(conf, []byte(text), 0o644); err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command(program, "serve", conf)
	cmd.Env = append(os.Environ(), "OTEL_TRACES_EXPORTER=none")
	log, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	cmd.Stdout, cmd.Stderr = w, w
	err = cmd.Start()
	w.Close()
	if err != nil {
		log.Close()
		t.Fatal(err)
	}
	said := bufio.NewReader(log)
	t.Cleanup(func() {
		cmd.Process.Kill()
		cmd.Wait()
		log.Close()
	})
	var all string
	for {
		line, err := said.ReadString('\n')
		if m := listening.FindStringSubmatch(line); m != nil { // the kernel takes connections
			go io.Copy(io.Discard, said)
			return m[1]
		}
		if all += line; err != nil {
			t.Fatalf("docker-registry does not listen: %s", all)
		}
	}
}
