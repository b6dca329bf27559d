package image

import (
	"context"
	"io"
	"net/http"
	"strings"
	"time"
)

// warmTime bounds what Warm waits for.
const warmTime = 5 * time.Second

// Warm opens n connections to the repository's registry in the background, so that
// requests to come that are made at the same time need not. Where requests share one
// connection (HTTP/2) it opens that. It does nothing where none is needed, and what goes
// wrong those requests will tell.
func (r *Repository) Warm(ctx context.Context, n int) {
	g, ok := r.store.(*registry)
	if !ok {
		return
	}
	root, _, _ := strings.Cut(g.endpoints[0].url, "/v2/")
	ctx = context.WithoutCancel(ctx)
	if strings.HasPrefix(root, "http://") {
		for range n {
			go g.knock(ctx, root)
		}
		return
	}
	go func() { // which of them it is the first one tells
		if g.knock(ctx, root) == 1 {
			for range n - 1 {
				go g.knock(ctx, root)
			}
		}
	}()
}

// knock makes a request and returns the major version of HTTP of its answer, 0 if there
// is none.
func (g *registry) knock(ctx context.Context, root string) int {
	ctx, cancel := context.WithTimeout(ctx, warmTime)
	defer cancel()
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, root+"/v2/", nil)
	if err != nil {
		return 0
	}
	req.Header.Set("User-Agent", g.opts.UserAgent)
	resp, err := g.base.RoundTrip(req)
	if err != nil {
		return 0
	}
	_, _ = io.Copy(io.Discard, io.LimitReader(resp.Body, 64<<10)) // so that the connection is kept
	_ = resp.Body.Close()
	return resp.ProtoMajor
}
