package cold

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"go.uber.org/goleak"

	"github.com/shale-image/shale/bench/netmodel"
	"github.com/shale-image/shale/bench/registry"
)

// TestMain is also the program that labs of these tests measure.
func TestMain(m *testing.M) {
	if os.Getenv("FAKE_SHALE") != "" {
		if err := fakeShale(os.Args[1:]); err != nil {
			fmt.Fprintln(os.Stderr, "fake:", err)
			os.Exit(1)
		}
		return
	}
	goleak.VerifyTestMain(m)
}

// fakeShale notes its arguments in a file. Its run fetches the image unless the
// node has it, prints a note, and then "ran" and the user.
func fakeShale(args []string) error {
	log, err := os.OpenFile(os.Getenv("FAKE_SHALE"), os.O_APPEND|os.O_WRONLY, 0)
	if err != nil {
		return err
	}
	fmt.Fprintln(log, args)
	log.Close()
	switch args[0] {
	case "index":
		if os.Getenv("FAKE_INDEX") == "" {
			fmt.Println("Usage:\n  shale [command]")
		} else if args[1] == "--help" {
			fmt.Println("Usage:\n  shale index [flags] REF")
		}
		return nil
	case "convert":
		return nil
	}
	root := args[1]
	if args[2] != "run" {
		return nil
	}
	user := ""
	if args[4] == "--user" {
		user = args[5]
		args = args[2:]
	}
	host, name, _ := strings.Cut(args[4], "/")
	if _, err := os.Stat(filepath.Join(root, "has")); err != nil {
		resp, err := http.Get("http://" + host + "/" + name)
		if err != nil {
			return err
		}
		defer resp.Body.Close()
		if _, err := io.Copy(io.Discard, resp.Body); err != nil {
			return err
		}
		if err := os.MkdirAll(root, 0o700); err != nil {
			return err
		}
		if err := os.WriteFile(filepath.Join(root, "has"), make([]byte, 10000), 0o600); err != nil {
			return err
		}
	}
	fmt.Fprintln(os.Stderr, "note: ran is coming")
	if len(args) > 5 && args[5] == "fail" {
		return errors.New("asked to fail")
	}
	if len(args) > 5 && args[5] == "sleep" {
		time.Sleep(time.Hour)
	}
	fmt.Println("ran", user)
	return nil
}

// newLab is a lab with a registry that answers everything with 1000 bytes, and
// the fake program; calls returns how that was called.
func newLab(t *testing.T) (lab *Lab, calls func() []string) {
	t.Helper()
	server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		w.Write(make([]byte, 1000))
	}))
	t.Cleanup(server.Close)
	proxy, err := netmodel.Start(server.URL, netmodel.Model{})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { proxy.Close() })
	log := filepath.Join(t.TempDir(), "log")
	if err := os.WriteFile(log, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	t.Setenv("FAKE_SHALE", log)
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	lab = &Lab{Options: Options{Shale: self}, dir: t.TempDir(), proxy: proxy}
	return lab, func() []string {
		p, err := os.ReadFile(log)
		if err != nil {
			t.Fatal(err)
		}
		return strings.Split(strings.TrimSpace(string(p)), "\n")
	}
}

func TestLazy(t *testing.T) {
	lab, calls := newLab(t)
	n := lab.Node()
	defer n.Close()
	first, err := n.Lazy(t.Context(), "img:1", Command{Args: []string{"a", "b"}, User: "me", Line: "ran me"})
	if err != nil {
		t.Fatal(err)
	}
	if first.Bytes != 1000 || first.Requests != 1 || first.First <= 0 || first.Disk < 10000 {
		t.Errorf("the first start cost %+v", first)
	}
	again, err := n.Lazy(t.Context(), "img:1", Command{})
	if err != nil {
		t.Fatal(err)
	}
	if again.Bytes != 0 || again.Requests != 0 || again.First <= 0 {
		t.Errorf("the second start cost %+v", again)
	}
	other := lab.Node()
	defer other.Close()
	if c, err := other.Lazy(t.Context(), "img:1", Command{}); err != nil || c.Bytes != 1000 {
		t.Errorf("on another node a start costs %+v, %v", c, err)
	}
	if err := n.Close(); err != nil {
		t.Error(err)
	}
	if _, err := os.Stat(n.dir); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("%s is left: %v", n.dir, err)
	}
	host := lab.proxy.Host()
	want := []string{
		fmt.Sprintf("[--root %s run --rm --user me %s/img:1 a b]", n.dir, host),
		fmt.Sprintf("[--root %s run --rm %s/img:1]", n.dir, host),
		fmt.Sprintf("[--root %s run --rm %s/img:1]", other.dir, host),
		fmt.Sprintf("[--root %s daemon stop]", n.dir),
	}
	if got := calls(); !slices.Equal(got, want) {
		t.Errorf("calls:\n%s\nwant:\n%s", strings.Join(got, "\n"), strings.Join(want, "\n"))
	}
}

func TestLazyErrors(t *testing.T) {
	lab, _ := newLab(t)
	for _, tt := range []struct {
		name string
		c    Command
		want []string
	}{
		{"fails", Command{Args: []string{"fail"}}, []string{"shale run", "asked to fail"}},
		{"fails before the line", Command{Args: []string{"fail"}, Line: "ran"}, []string{"shale run", "asked to fail"}},
		{"another line", Command{Line: "other"}, []string{`"other"`, "ran"}},
	} {
		n := lab.Node()
		_, err := n.Lazy(t.Context(), "img:1", tt.c)
		for _, want := range tt.want {
			if err == nil || !strings.Contains(err.Error(), want) {
				t.Errorf("%s: error %v, want one with %q", tt.name, err, want)
			}
		}
		if err := n.Close(); err != nil {
			t.Error(err)
		}
	}
}

func TestLazyEndsWithItsContext(t *testing.T) {
	lab, calls := newLab(t)
	n := lab.Node()
	defer n.Close()
	ctx, cancel := context.WithCancel(t.Context())
	go func() {
		for len(calls()[0]) == 0 { // not before it runs
			time.Sleep(time.Millisecond)
		}
		cancel()
	}()
	if _, err := n.Lazy(ctx, "img:1", Command{Args: []string{"sleep"}}); err == nil {
		t.Error("it ended well")
	}
}

func TestPrepare(t *testing.T) {
	lab, calls := newLab(t)
	lab.registry = &registry.Registry{} // only its address matters, "" here
	if err := lab.Index(t.Context(), "img:1"); !errors.Is(err, ErrNoIndex) {
		t.Errorf("error %v, want %v", err, ErrNoIndex)
	}
	t.Setenv("FAKE_INDEX", "yes")
	if err := lab.Index(t.Context(), "img:1"); err != nil {
		t.Error(err)
	}
	if err := lab.Convert(t.Context(), "img:1", "img:2", "--chunk-size", "16K"); err != nil {
		t.Error(err)
	}
	want := []string{"[index --help]", "[index --help]", "[index --push /img:1]", "[convert /img:1 /img:2 --chunk-size 16K]"}
	if got := calls(); !slices.Equal(got, want) {
		t.Errorf("calls:\n%s\nwant:\n%s", strings.Join(got, "\n"), strings.Join(want, "\n"))
	}
	lab.Shale = filepath.Join(t.TempDir(), "none")
	if err := lab.Convert(t.Context(), "a:1", "b:1"); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("without a program: %v", err)
	}
}

func TestMedian(t *testing.T) {
	got := Median([]Cost{
		{First: 3, Bytes: 10, Disk: 7, Requests: 1},
		{First: 1, Bytes: 30, Disk: 7, Requests: 2},
		{First: 2, Bytes: 20, Disk: 7, Requests: 9},
	})
	if want := (Cost{First: 2, Bytes: 20, Disk: 7, Requests: 2}); got != want {
		t.Errorf("%+v, want %+v", got, want)
	}
}

func TestCostAsJSON(t *testing.T) {
	got, err := json.Marshal(Cost{First: 250 * time.Millisecond, Bytes: 81920, Requests: 7, Disk: 4096, Stalls: 2})
	if want := `{"seconds":0.25,"bytes":81920,"requests":7,"disk":4096,"stalls":2}`; err != nil || string(got) != want {
		t.Errorf("%s, %v, want %s", got, err, want)
	}
}
