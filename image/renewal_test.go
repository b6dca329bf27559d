package image_test

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync"
	"sync/atomic"
	"testing"

	"github.com/shale-image/shale/blob"
	"github.com/shale-image/shale/image"
)

// lock is a registry whose password changes.
type lock struct {
	password atomic.Value // string
	status   atomic.Int64 // said of any other
	refused  atomic.Int64 // requests
}

// basic wants the password of each request.
func (l *lock) basic(next http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		_, p, ok := r.BasicAuth()
		switch {
		case !ok:
			w.Header().Set("WWW-Authenticate", `Basic realm="r"`)
			w.WriteHeader(http.StatusUnauthorized)
		case p != l.password.Load():
			l.refused.Add(1)
			w.WriteHeader(int(l.status.Load()))
		default:
			next.ServeHTTP(w, r)
		}
	})
}

// locked is one with an image.
func locked(t *testing.T, status int64) (*lock, string) {
	l := &lock{}
	l.password.Store("1")
	l.status.Store(status)
	host := serve(t, l.basic)
	pushImage(t, open(t, host+"/app", image.Options{Credentials: password("1")}), "v1", "amd64")
	return l, host
}

func password(p string) image.Credentials { return image.Credentials{Username: "u", Password: p} }

func readBlob(t *testing.T, repo *image.Repository) error {
	t.Helper()
	p, err := blob.ReadAll(t.Context(), repo.Blobs(), desc(tarGzip, layers[1]).Ref(), 3, 10)
	if err == nil && string(p) != string(layers[1][3:13]) {
		t.Errorf("%q", p)
	}
	return err
}

// TestRenewal: a registry that does not take its password any more is asked with a new
// one, whether it says 401 or 403, and whether or not it took the old one from here.
func TestRenewal(t *testing.T) {
	for _, status := range []int64{http.StatusUnauthorized, http.StatusForbidden} {
		for _, late := range []bool{false, true} {
			t.Run(fmt.Sprint(status, late), func(t *testing.T) {
				l, host := locked(t, status)
				var renewed []string
				repo := open(t, host+"/app:v1", image.Options{Credentials: password("1"), Renewal: func(_ context.Context, refused image.Credentials) (image.Credentials, error) {
					renewed = append(renewed, refused.Password)
					return password(l.password.Load().(string)), nil
				}})
				if !late {
					if err := readBlob(t, repo); err != nil || renewed != nil {
						t.Fatal(err, renewed)
					}
				}
				for _, p := range []string{"2", "3"} {
					l.password.Store(p)
					for range 3 {
						if err := readBlob(t, repo); err != nil {
							t.Fatal(err)
						}
					}
				}
				if strings.Join(renewed, " ") != "1 2" || l.refused.Load() != 2 {
					t.Errorf("instead of %v, after %d refusals", renewed, l.refused.Load())
				}
			})
		}
	}
}

// TestRenewalInVain: what has nothing better is refused, as without; nobody knows is
// something else.
func TestRenewalInVain(t *testing.T) {
	for _, status := range []int64{http.StatusUnauthorized, http.StatusForbidden} {
		l, host := locked(t, status)
		l.password.Store("nobody has it")
		asked := 0
		var say func(refused image.Credentials) (image.Credentials, error)
		repo := open(t, host+"/app:v1", image.Options{Credentials: password("old"), Renewal: func(_ context.Context, refused image.Credentials) (image.Credentials, error) {
			asked++
			return say(refused)
		}})
		for _, c := range []struct {
			say   func(refused image.Credentials) (image.Credentials, error)
			want  error
			asked int
		}{
			{func(c image.Credentials) (image.Credentials, error) { return c, nil }, blob.ErrUnauthorized, 1},
			// One that says something else each time, as ECR's does.
			{func(c image.Credentials) (image.Credentials, error) { return password(c.Password + "+"), nil }, blob.ErrUnauthorized, 2},
			{func(image.Credentials) (image.Credentials, error) {
				return image.Credentials{}, fmt.Errorf("the helper hangs: %w", blob.ErrNotFound)
			}, blob.ErrUnavailable, 1},
		} {
			say, asked = c.say, 0
			err := readBlob(t, repo)
			if !errors.Is(err, c.want) || errors.Is(err, blob.ErrNotFound) || asked != c.asked || strings.Contains(err.Error(), "old") {
				t.Errorf("%d: %v, asked %d times; want %v, %d", status, err, asked, c.want, c.asked)
			}
		}
	}
}

// TestRenewalOfTokens: a token server that refuses the credentials is asked with others,
// when a token has run out and when there was none yet. 400 is what OAuth says.
func TestRenewalOfTokens(t *testing.T) {
	for _, status := range []int{http.StatusUnauthorized, http.StatusForbidden, http.StatusBadRequest} {
		ts, host := newTokens(t, 1<<40)
		pushImage(t, open(t, host+"/app:v1", image.Options{}), "v1", "amd64")
		refresh := atomic.Value{}
		refresh.Store("1")
		var refused atomic.Int64
		front := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			r.ParseForm()
			if r.Form.Get("refresh_token") != refresh.Load() {
				refused.Add(1)
				w.WriteHeader(status)
				return
			}
			r.Form.Del("refresh_token")
			ts.token(w, r)
		}))
		defer front.Close()
		ts.mu.Lock()
		ts.realm, ts.uses = front.URL+"/token", 3
		ts.mu.Unlock()
		renewed := 0
		options := func() image.Options {
			return image.Options{Credentials: image.Credentials{IdentityToken: "1"}, Renewal: func(_ context.Context, _ image.Credentials) (image.Credentials, error) {
				renewed++
				return image.Credentials{IdentityToken: refresh.Load().(string)}, nil
			}}
		}
		repo := open(t, host+"/app:v1", options())
		if err := readBlob(t, repo); err != nil {
			t.Fatal(err)
		}
		refresh.Store("2")
		for range 5 {
			if err := readBlob(t, repo); err != nil {
				t.Fatal(err)
			}
		}
		if err := readBlob(t, open(t, host+"/app:v1", options())); err != nil {
			t.Fatal(err)
		}
		if renewed != 2 || refused.Load() != 2 {
			t.Errorf("%d: %d renewals after %d refusals, want 2", status, renewed, refused.Load())
		}
	}
}

// TestRenewalConcurrent: many who are refused at once ask for other credentials once.
func TestRenewalConcurrent(t *testing.T) {
	l, host := locked(t, http.StatusForbidden)
	var renewed atomic.Int64
	repo := open(t, host+"/app:v1", image.Options{Credentials: password("1"), Renewal: func(context.Context, image.Credentials) (image.Credentials, error) {
		renewed.Add(1)
		return password("2"), nil
	}})
	if err := readBlob(t, repo); err != nil {
		t.Fatal(err)
	}
	l.password.Store("2")
	var wg sync.WaitGroup
	for range 32 {
		wg.Go(func() {
			if err := readBlob(t, repo); err != nil {
				t.Error(err)
			}
		})
	}
	wg.Wait()
	if n := renewed.Load(); n != 1 {
		t.Errorf("%d renewals", n)
	}
}

// TestRenewalStays: a mirror, which gets no credentials, is no reason to ask for any.
func TestRenewalStays(t *testing.T) {
	_, mirror := locked(t, http.StatusUnauthorized)
	_, host := locked(t, http.StatusUnauthorized)
	repo := open(t, host+"/app:v1", image.Options{Credentials: password("1"), Mirrors: []string{mirror}, Renewal: func(context.Context, image.Credentials) (image.Credentials, error) {
		t.Error("credentials are asked for")
		return image.Credentials{}, nil
	}})
	if err := readBlob(t, repo); err != nil {
		t.Error(err)
	}
}

// TestEnvironment: what is said of where credentials are from is what a lookup needs.
func TestEnvironment(t *testing.T) {
	for _, v := range []string{"DOCKER_CONFIG", "REGISTRY_AUTH_FILE", "XDG_RUNTIME_DIR", "XDG_CONFIG_HOME"} {
		t.Setenv(v, "")
	}
	dir := t.TempDir()
	t.Chdir(dir)
	t.Setenv("HOME", "/home/me")
	t.Setenv("DOCKER_CONFIG", "config")
	t.Setenv("PATH", "/bin")
	t.Setenv("AWS_PROFILE", "hunter2")
	t.Setenv("LD_PRELOAD", "/evil.so")
	t.Setenv("SHALE_ROOT", "/x")
	env := image.LookupEnvironment()
	got := "\n" + strings.Join(env, "\n") + "\n"
	for _, want := range []string{"HOME=/home/me", "DOCKER_CONFIG=" + dir + "/config", "PATH=/bin", "AWS_PROFILE=hunter2"} {
		if !strings.Contains(got, "\n"+want+"\n") {
			t.Errorf("no %s in %s", want, got)
		}
	}
	if strings.Contains(got, "LD_PRELOAD") || strings.Contains(got, "SHALE") || env.Check() != nil {
		t.Errorf("%s: %v", got, env.Check())
	}
	if s := fmt.Sprintf("%v %+v %#v", env, struct{ E image.Environment }{env}, env); strings.Contains(s, "hunter2") {
		t.Error(s)
	}
	t.Setenv("AWS_LONG", strings.Repeat("x", 1<<20))
	if env := image.LookupEnvironment(); env.Check() != nil || !strings.Contains(strings.Join(env, "\n"), "HOME=/home/me") {
		t.Errorf("with a long variable: %v", env.Check())
	}
	for _, bad := range []image.Environment{{"LD_PRELOAD=x"}, {"HOME"}, {"HOME=a\x00b"}, {"HOME=" + strings.Repeat("x", 1<<20)}, {""}} {
		if bad.Check() == nil {
			t.Errorf("%v is let through", []string(bad))
		}
	}
}
