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
// requests to come that are made at the same time need not. It does nothing where
// requests share one connection (HTTP/2) or none is needed, and what goes wrong
// those requests will tell.
func (r *Repository) Warm(ctx context.Context, n int) {
	g, ok := r.store.(*registry)
	if !ok {
		return
	}
	root, _, _ := strings.Cut(g.endpoints[0].url, "/v2/")
	if !strings.HasPrefix(root, "http://") {
		return
	}
	ctx = context.WithoutCancel(ctx)
	for range n {
		go func() {
			ctx, cancel := context.WithTimeout(ctx, warmTime)
			defer cancel()
			req, err := http.NewRequestWithContext(ctx, http.MethodGet, root+"/v2/", nil)
			if err != nil {
				return
			}
			req.Header.Set("User-Agent", g.opts.UserAgent)
			resp, err := g.base.RoundTrip(req)
			if err != nil {
				return
			}
			_, _ = io.Copy(io.Discard, io.LimitReader(resp.Body, 64<<10)) // so that the connection is kept
			_ = resp.Body.Close()
		}()
	}
}
