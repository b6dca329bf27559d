package main

import (
	"archive/tar"
	"bufio"
	"bytes"
	"compress/gzip"
	"context"
	"crypto/sha256"
	"encoding/base64"
	"encoding/json"
	"fmt"
	"io"
	"log"
	"math/rand/v2"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/google/go-containerregistry/pkg/registry"
	"github.com/klauspost/compress/zstd"
	"github.com/rogpeppe/go-internal/testscript"

	"github.com/shale-image/shale/image"
)

// mktar makes an archive of lines such as
//
//	d etc 0755 0:0
//	f etc/motd 0644 0:0 hello, world
//	r data/big 0644 0:0 300000 7        300000 random bytes of seed 7
//	z data/zeros 0644 0:0 200000        zeros
//	i bin/hello 0755 0:0 /path          what is in a file of the host
//	l bin/sh 0777 0:0 busybox           a symbolic link to busybox
//	h bin/ash 0644 0:0 bin/busybox      a hard link
//	c dev/null 0666 0:0 1 3
//	p run/fifo 0600 0:0
//	x user.note on the next entry       an extended attribute
//	t 12345                             mtime of what follows
func mktar(spec string) ([]byte, error) {
	var buf bytes.Buffer
	w := tar.NewWriter(&buf)
	mtime := time.Unix(1_000_000_000, 0)
	xattrs := map[string]string{}
	for s := bufio.NewScanner(strings.NewReader(spec)); s.Scan(); {
		f := strings.SplitN(s.Text(), " ", 5)
		switch {
		case s.Text() == "":
			continue
		case f[0] == "t" && len(f) == 2:
			sec, err := strconv.ParseInt(f[1], 10, 64)
			if err != nil {
				return nil, err
			}
			mtime = time.Unix(sec, 0)
			continue
		case f[0] == "x":
			_, value, _ := strings.Cut(s.Text(), f[1]+" ")
			xattrs["SCHILY.xattr."+f[1]] = value
			continue
		case len(f) < 4:
			return nil, fmt.Errorf("mktar: %q", s.Text())
		}
		rest := ""
		if len(f) == 5 {
			rest = f[4]
		}
		h := &tar.Header{Name: f[1], ModTime: mtime, PAXRecords: xattrs, Format: tar.FormatPAX}
		xattrs = map[string]string{}
		mode, err := strconv.ParseInt(f[2], 8, 32)
		if err != nil {
			return nil, err
		}
		h.Mode = mode
		if _, err := fmt.Sscanf(f[3], "%d:%d", &h.Uid, &h.Gid); err != nil {
			return nil, err
		}
		body, err := fillHeader(h, f[0], rest)
		if err != nil {
			return nil, fmt.Errorf("mktar: %q: %w", s.Text(), err)
		}
		h.Size = int64(len(body))
		if err := w.WriteHeader(h); err != nil {
			return nil, err
		}
		if _, err := w.Write(body); err != nil {
			return nil, err
		}
	}
	err := w.Close()
	return buf.Bytes(), err
}

// fillHeader sets what depends on the kind of entry and returns the content.
func fillHeader(h *tar.Header, kind, rest string) (body []byte, err error) {
	h.Typeflag = tar.TypeReg
	switch kind {
	case "f":
		return []byte(rest + "\n"), nil
	case "r":
		var n, seed uint64
		if _, err := fmt.Sscanf(rest, "%d %d", &n, &seed); err != nil {
			return nil, err
		}
		return random(int(n), byte(seed)), nil
	case "z":
		n, err := strconv.Atoi(rest)
		return make([]byte, n), err
	case "i":
		return os.ReadFile(rest)
	case "d":
		h.Typeflag = tar.TypeDir
	case "l":
		h.Typeflag, h.Linkname = tar.TypeSymlink, rest
	case "h":
		h.Typeflag, h.Linkname = tar.TypeLink, rest
	case "p":
		h.Typeflag = tar.TypeFifo
	case "c":
		h.Typeflag = tar.TypeChar
		_, err = fmt.Sscanf(rest, "%d %d", &h.Devmajor, &h.Devminor)
	default:
		err = fmt.Errorf("unknown kind %q", kind)
	}
	return nil, err
}

func random(n int, seed byte) []byte {
	p := make([]byte, n)
	rand.NewChaCha8([32]byte{seed}).Read(p)
	return p
}

// imageOptions are what a test image may have of its own.
type imageOptions struct {
	platform   string // default: this machine's
	configType string // default: an image's
	compress   string // "zstd": layers that are one frame; "zstd-bytes": which cannot be cut; default: gzip
	cred       image.Credentials
}

// pushImage pushes an image with the given archives as layers to a layout or a
// registry.
func pushImage(ctx context.Context, ref string, tars [][]byte, o imageOptions) error {
	r, err := image.ParseRef(ref)
	if err != nil {
		return err
	}
	repo, err := image.Open(ctx, r, image.Options{Credentials: o.cred})
	if err != nil {
		return err
	}
	defer repo.Close()
	if o.platform == "" {
		o.platform = "linux/" + runtime.GOARCH
	}
	if o.configType == "" {
		o.configType = image.MediaTypeConfig
	}
	push := func(mediaType string, p []byte) (image.Descriptor, error) {
		d := image.Descriptor{MediaType: mediaType, Digest: digestOf(p), Size: int64(len(p))}
		return d, repo.PushBlob(ctx, d, func() (io.ReadCloser, error) { return io.NopCloser(bytes.NewReader(p)), nil })
	}
	os, arch, _ := strings.Cut(o.platform, "/")
	layers, diffIDs := []image.Descriptor{}, []string{}
	for _, t := range tars {
		mediaType, p, err := compress(o.compress, t)
		if err != nil {
			return err
		}
		d, err := push(mediaType, p)
		if err != nil {
			return err
		}
		layers, diffIDs = append(layers, d), append(diffIDs, digestOf(t))
	}
	js, err := json.Marshal(map[string]any{
		"os": os, "architecture": arch,
		"config": map[string]any{"Cmd": []string{"/bin/hello"}, "Env": []string{"PATH=/bin"}},
		"rootfs": map[string]any{"type": "layers", "diff_ids": diffIDs},
	})
	if err != nil {
		return err
	}
	config, err := push(o.configType, js)
	if err != nil {
		return err
	}
	js, err = json.Marshal(map[string]any{"schemaVersion": 2, "mediaType": image.MediaTypeManifest, "config": config, "layers": layers})
	if err != nil {
		return err
	}
	_, err = repo.PushManifest(ctx, image.MediaTypeManifest, js, r.Tag())
	return err
}

// compress makes a layer of an archive.
func compress(as string, archive []byte) (mediaType string, layer []byte, err error) {
	if as == "zstd" {
		e, err := zstd.NewWriter(nil)
		if err != nil {
			return "", nil, err
		}
		return "application/vnd.oci.image.layer.v1.tar+zstd", e.EncodeAll(archive, nil), nil
	}
	if as == "zstd-bytes" { // many blocks of a byte each, longer than what they hold
		var z bytes.Buffer
		e, err := zstd.NewWriter(&z, zstd.WithEncoderConcurrency(1))
		for i := 0; i < 50_000 && err == nil; i++ {
			if _, err = e.Write(archive[i : i+1]); err == nil {
				err = e.Flush()
			}
		}
		if err == nil {
			_, err = e.Write(archive[50_000:])
		}
		if err == nil {
			err = e.Close()
		}
		return "application/vnd.oci.image.layer.v1.tar+zstd", z.Bytes(), err
	}
	var z bytes.Buffer
	w, err := gzip.NewWriterLevel(&z, gzip.BestSpeed)
	if err != nil {
		return "", nil, err
	}
	if _, err := w.Write(archive); err != nil {
		return "", nil, err
	}
	err = w.Close()
	return "application/vnd.oci.image.layer.v1.tar+gzip", z.Bytes(), err
}

func digestOf(p []byte) string { return fmt.Sprintf("sha256:%x", sha256.Sum256(p)) }

func cmdMktar(ts *testscript.TestScript, neg bool, args []string) {
	if neg || len(args) != 2 {
		ts.Fatalf("usage: mktar OUT SPEC")
	}
	p, err := mktar(os.Expand(ts.ReadFile(args[1]), ts.Getenv))
	ts.Check(err)
	ts.Check(os.WriteFile(ts.MkAbs(args[0]), p, 0o644))
}

func cmdMkoci(ts *testscript.TestScript, neg bool, args []string) {
	flags := 0
	for len(args) > flags+1 && strings.HasPrefix(args[flags], "-") {
		flags += 2
	}
	if neg || len(args) < flags+2 {
		ts.Fatalf("usage: mkoci [-platform P] [-config MEDIATYPE] DIR TAG TAR...")
	}
	ref := "oci:" + ts.MkAbs(args[flags]) + ":" + args[flags+1]
	cmdMkimage(ts, neg, append(append(append([]string{}, args[:flags]...), ref), args[flags+2:]...))
}

func cmdMkimage(ts *testscript.TestScript, neg bool, args []string) {
	var o imageOptions
	for len(args) > 1 && strings.HasPrefix(args[0], "-") {
		switch args[0] {
		case "-platform":
			o.platform = args[1]
		case "-config":
			o.configType = args[1]
		case "-compress":
			o.compress = args[1]
		default:
			ts.Fatalf("mkimage: flag %s", args[0])
		}
		args = args[2:]
	}
	if neg || len(args) < 1 {
		ts.Fatalf("usage: mkimage [-platform P] [-config MEDIATYPE] [-compress zstd|zstd-bytes] REF TAR...")
	}
	host, _, _ := strings.Cut(args[0], "/")
	if login := ts.Getenv("LOGIN_" + host); login != "" {
		o.cred.Username, o.cred.Password, _ = strings.Cut(login, ":")
	}
	var tars [][]byte
	for _, name := range args[1:] {
		tars = append(tars, []byte(ts.ReadFile(name)))
	}
	ts.Check(pushImage(context.Background(), args[0], tars, o))
}

func cmdRegistry(ts *testscript.TestScript, neg bool, args []string) {
	if neg || len(args) < 1 || len(args) > 2 {
		ts.Fatalf("usage: registry VAR [USER:PASSWORD | @FILE | noranges]")
	}
	h := http.Handler(registry.New(registry.Logger(log.New(io.Discard, "", 0))))
	login := ""
	switch {
	case len(args) < 2:
	case args[1] == "noranges": // who asks for a part gets all
		whole := h
		h = http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			r.Header.Del("Range")
			whole.ServeHTTP(w, r)
		})
	default:
		login = args[1]
		wants := func() string { return login }
		if file, ok := strings.CutPrefix(args[1], "@"); ok { // what it has at the moment
			login, file = strings.TrimSpace(ts.ReadFile(file)), ts.MkAbs(file)
			wants = func() string {
				p, _ := os.ReadFile(file)
				return strings.TrimSpace(string(p))
			}
		}
		h = authenticated(h, wants)
	}
	srv := httptest.NewServer(h)
	ts.Defer(srv.Close)
	host := strings.TrimPrefix(srv.URL, "http://")
	ts.Setenv(args[0], host)
	ts.Setenv("LOGIN_"+host, login)
	registries.Store(host, srv)
}

var registries sync.Map // the servers, by host

func cmdDown(ts *testscript.TestScript, neg bool, args []string) {
	if neg || len(args) != 1 {
		ts.Fatalf("usage: down HOST")
	}
	srv, ok := registries.LoadAndDelete(args[0])
	if !ok {
		ts.Fatalf("%s is no registry", args[0])
	}
	srv.(*httptest.Server).CloseClientConnections()
	srv.(*httptest.Server).Close()
}

// authenticated lets nobody in but the USER:PASSWORD it wants.
func authenticated(h http.Handler, wants func() string) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if user, password, _ := r.BasicAuth(); user+":"+password != wants() {
			w.Header().Set("WWW-Authenticate", `Basic realm="test"`)
			http.Error(w, `{"errors":[{"code":"UNAUTHORIZED"}]}`, http.StatusUnauthorized)
			return
		}
		h.ServeHTTP(w, r)
	})
}

func cmdLogin(ts *testscript.TestScript, neg bool, args []string) {
	if neg || len(args) != 2 {
		ts.Fatalf("usage: login HOST USER:PASSWORD")
	}
	auth := base64.StdEncoding.EncodeToString([]byte(args[1]))
	dir := ts.Getenv("DOCKER_CONFIG")
	ts.Check(os.MkdirAll(dir, 0o700))
	ts.Check(os.WriteFile(filepath.Join(dir, "config.json"), fmt.Appendf(nil, `{"auths":{%q:{"auth":%q}}}`, args[0], auth), 0o600))
}

func cmdBlobfile(ts *testscript.TestScript, neg bool, args []string) {
	if neg || len(args) != 3 {
		ts.Fatalf("usage: blobfile VAR DIR:TAG N")
	}
	n, err := strconv.Atoi(args[2])
	ts.Check(err)
	dir, tag, _ := strings.Cut(args[1], ":")
	files, err := layoutFiles(ts.MkAbs(dir), tag)
	ts.Check(err)
	ts.Setenv(args[0], files.layers[n])
}

// imageFiles are the files of an image in a layout.
type imageFiles struct {
	manifest, config string
	layers           []string
}

func layoutFiles(dir, tag string) (*imageFiles, error) {
	r, err := image.ParseRef("oci:" + dir + ":" + tag)
	if err != nil {
		return nil, err
	}
	repo, err := image.Open(context.Background(), r, image.Options{})
	if err != nil {
		return nil, err
	}
	defer repo.Close()
	img, err := repo.ResolveManifest(context.Background(), image.Platform{})
	if err != nil {
		return nil, err
	}
	file := func(digest string) string {
		return filepath.Join(dir, "blobs", "sha256", strings.TrimPrefix(digest, "sha256:"))
	}
	f := &imageFiles{manifest: file(img.ManifestDigest), config: file(img.ConfigBlob.Digest)}
	for _, l := range img.Layers {
		f.layers = append(f.layers, file(l.Digest))
	}
	return f, nil
}
