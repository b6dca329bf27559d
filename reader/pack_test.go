package reader

import (
	"bytes"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"maps"
	"strings"
	"testing"
	"testing/iotest"
	"time"

	"github.com/shale-image/shale/image"
	"github.com/shale-image/shale/pack"
)

func TestPackRefs(t *testing.T) {
	digest := "sha256:" + strings.Repeat("ab", 32)
	good := map[string]string{packDigest: digest, packSize: "100", packIndex: digest, packCommands: `[["a","b"],[]]`}
	with := func(key, value string) image.Referrer {
		a := maps.Clone(good)
		a[key] = value
		return image.Referrer{Type: PackArtifactType, Descriptor: image.Descriptor{Digest: digest, Annotations: a}}
	}
	found := []image.Referrer{
		with("", ""), with(packIndex, ""), with(packProgram, "true"),
		{Type: ArtifactType, Descriptor: image.Descriptor{Annotations: good}},
		{Type: PackArtifactType},
		with(packDigest, "sha256:12"), with(packDigest, "sha512:"+strings.Repeat("ab", 64)), with(packSize, "0"), with(packSize, "-1"), with(packSize, "9e9"),
		with(packSize, "99999999999999"), with(packIndex, "md5:1"), with(packCommands, "x"), with(packCommands, `{"a":1}`),
		with(packCommands, "["+strings.Repeat("[],", 300)+"[]]"),
	}
	got := packRefs(found)
	if len(got) != 3 || got[0].Blob.Digest != digest || got[0].Blob.Size != 100 || len(got[0].Commands) != 2 || got[1].Index != "" || got[0].Entrypoint || !got[2].Entrypoint {
		t.Errorf("%+v", got)
	}
	var many []image.Referrer
	for range 1000 {
		many = append(many, with("", ""))
	}
	if got := packRefs(many); len(got) != maxPacks {
		t.Errorf("%d packs of 1000 are looked at", len(got))
	}
	withProgram := PackRef{Entrypoint: true}
	if a, err := withProgram.annotations(); err != nil || a[packProgram] != "true" {
		t.Errorf("%v, %v", a, err)
	}
	back, err := got[0].annotations()
	if err != nil || !maps.Equal(back, good) {
		t.Errorf("%v, %v", back, err)
	}
}

func TestChoose(t *testing.T) {
	of := func(commands ...[]string) PackRef { return PackRef{Commands: commands} }
	packs := []PackRef{
		0: of([]string{}),
		1: of([]string{"python3", "a.py"}, []string{"python3", "b.py"}),
		2: of([]string{"python3", "-c", "import numpy"}),
		3: of([]string{"--entrypoint=sh", "-c"}),
		4: of([]string{}, []string{"python3", "-c", "import numpy"}), // in no case better than one of one command
		5: of([]string{"big"}),
		6: of([]string{"big"}),
	}
	packs[2].Blob.Size, packs[5].Blob.Size, packs[6].Blob.Size = 1<<20, 2000, 1000
	for _, c := range []struct {
		start Start
		want  int // -1: none
	}{
		{Start{}, 0},
		{Start{Args: []string{"python3", "b.py"}}, 1},
		{Start{Args: []string{"python3", "-c", "print(1)"}}, 2},
		{Start{Args: []string{"python3"}}, 2}, // of one command
		{Start{Args: []string{"bash"}}, -1},
		{Start{Args: []string{"--entrypoint=sh", "-c", "x"}}, 3},
		{Start{Any: true}, 0},
		{Start{Args: []string{"python3", "-c", "import numpy"}}, 2},
		{Start{Args: []string{"big"}}, 6},
		{Start{Args: []string{"--entrypoint=bash"}}, -1},
	} {
		got := -1
		if p := c.start.Choose(packs); p != nil {
			for i := range packs {
				if &packs[i] == p {
					got = i
				}
			}
		}
		if got != c.want {
			t.Errorf("%+v: pack %d, want %d", c.start, got, c.want)
		}
	}
	// The image's entrypoint takes what is said behind its name.
	for i := range packs {
		packs[i].Entrypoint = i != 0
	}
	for _, c := range []struct {
		args []string
		want int // -1: none
		from int // packs[from:to] are there
		to   int
	}{
		{[]string{"--port", "80"}, 1, 0, 2},
		{[]string{"python3", "c.py"}, 1, 0, 2},
		{nil, 0, 0, 2},
		{[]string{"--port", "80"}, 2, 1, 4}, // of one command
		{[]string{"--entrypoint=sh", "x"}, 3, 1, 4},
		{[]string{"--entrypoint=bash"}, -1, 1, 4},
		{[]string{"--port", "80"}, -1, 3, 4},
	} {
		got := -1
		if p := (&Start{Args: c.args}).Choose(packs[c.from:c.to]); p != nil {
			for i := range packs {
				if &packs[i] == p {
					got = i
				}
			}
		}
		if got != c.want {
			t.Errorf("%q of an entrypoint: pack %d, want %d", c.args, got, c.want)
		}
	}
	if f := (&Start{Args: []string{"--b"}, Entrypoint: true}).Fit([]string{"--a"}); f != 1 {
		t.Errorf("other arguments of an entrypoint fit %d", f)
	}
	if p := (&Start{Any: true}).Choose(nil); p != nil {
		t.Error("a pack of none")
	}
	if p := (&Start{Any: true}).Choose(packs[2:4]); p != &packs[3] {
		t.Errorf("any: %+v", p)
	}
}

func TestSpool(t *testing.T) {
	content := bytes.Repeat([]byte("0123456789abcdef"), 1<<16)
	s := newSpool(t.Context(), func(context.Context) (io.ReadCloser, error) { return io.NopCloser(bytes.NewReader(content)), nil })
	got, err := io.ReadAll(iotest.HalfReader(s))
	if err != nil || !bytes.Equal(got, content) {
		t.Errorf("%d bytes, %v", len(got), err)
	}
	s.Close()

	broken := errors.New("broken")
	s = newSpool(t.Context(), func(context.Context) (io.ReadCloser, error) {
		return io.NopCloser(io.MultiReader(strings.NewReader("some"), iotest.ErrReader(broken))), nil
	})
	if got, err := io.ReadAll(s); string(got) != "some" || !errors.Is(err, broken) {
		t.Errorf("%q, %v", got, err)
	}
	s.Close()

	s = newSpool(t.Context(), func(context.Context) (io.ReadCloser, error) { return nil, broken })
	if _, err := s.Read(make([]byte, 1)); !errors.Is(err, broken) {
		t.Error(err)
	}
	s.Close()
}

// TestSpoolClose: a reader that waits, and a source that gives without end, end
// with Close.
func TestSpoolClose(t *testing.T) {
	s := newSpool(t.Context(), func(ctx context.Context) (io.ReadCloser, error) {
		return io.NopCloser(readerFunc(func([]byte) (int, error) {
			<-ctx.Done()
			return 0, ctx.Err()
		})), nil
	})
	read := make(chan error, 1)
	go func() {
		_, err := s.Read(make([]byte, 1))
		read <- err
	}()
	time.Sleep(10 * time.Millisecond)
	s.Close()
	if err := <-read; err == nil {
		t.Error("a read after Close")
	}

	endless := 0
	s = newSpool(t.Context(), func(context.Context) (io.ReadCloser, error) {
		return io.NopCloser(readerFunc(func(p []byte) (int, error) {
			endless += len(p)
			return len(p), nil
		})), nil
	})
	if _, err := io.CopyN(io.Discard, s, 1<<20); err != nil {
		t.Error(err)
	}
	s.Close()
	if endless > 1<<20+spoolAhead+1<<20 {
		t.Errorf("%d bytes were read for one MiB", endless)
	}
}

type readerFunc func([]byte) (int, error)

func (f readerFunc) Read(p []byte) (int, error) { return f(p) }

// TestPackMetadata: an index is taken out of a pack as it comes, unless that hangs or
// dribbles: then somebody else has to bring it.
func TestPackMetadata(t *testing.T) {
	metadata := bytes.Repeat([]byte("index"), 100_000)
	var whole bytes.Buffer
	if _, err := pack.Build(t.Context(), &whole, metadata, nil, pack.Options{}); err != nil {
		t.Fatal(err)
	}
	d := image.Descriptor{Digest: fmt.Sprintf("sha256:%x", sha256.Sum256(metadata)), Size: int64(len(metadata))}
	for name, c := range map[string]struct {
		first, each int // bytes that come at once, and every 100 ms
		late        bool
	}{
		"at once":          {1 << 20, 0, false},
		"at a slow link":   {0, 25_000, false},
		"never begins":     {0, 0, true},
		"hangs at the end": {450_000, 0, true},
		"dribbles":         {100_000, 1000, true},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			p := &Pack{PackRef: PackRef{Blob: image.Descriptor{Digest: "sha256:pack"}}, checked: make(chan struct{}), cancel: func() {}}
			close(p.checked)
			rest, free := whole.Bytes(), c.first
			p.spool = newSpool(t.Context(), func(ctx context.Context) (io.ReadCloser, error) {
				return io.NopCloser(readerFunc(func(b []byte) (int, error) {
					for free == 0 {
						select {
						case <-ctx.Done():
							return 0, ctx.Err()
						case <-time.After(100 * time.Millisecond):
							free = c.each
						}
					}
					n := copy(b, rest[:min(len(rest), free)])
					if rest, free = rest[n:], free-n; n == 0 {
						return 0, io.EOF
					}
					return n, nil
				})), nil
			})
			defer p.Close()
			f, err := scratch(t.TempDir())
			if err != nil {
				t.Fatal(err)
			}
			defer f.Close()
			if err := p.metadata(f, d); (err != nil) != c.late {
				t.Errorf("%v, want an error: %v", err, c.late)
			}
		})
	}
}
