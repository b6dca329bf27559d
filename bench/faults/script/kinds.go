package script

import (
	"net/http"
	"time"

	"github.com/shale-image/shale/bench/netmodel"
)

// kind is one fault of the language.
type kind struct {
	args []arg
	// do adds the fault to what is to happen to a request.
	do func(p *Player, args [2]int64, f *netmodel.Fault, r *http.Request)

	disk  bool // a fault of the disk
	lasts bool // for a time: it is no matter of single requests
}

// forever is longer than anybody waits.
const forever = 24 * time.Hour

var kinds map[string]*kind

func init() { // some of them know the others
	kinds = map[string]*kind{
		// No answer, or a refusal.
		"status": {args: []arg{{unit: code}, {unit: duration, word: "retry-after"}}, do: func(_ *Player, a [2]int64, f *netmodel.Fault, _ *http.Request) {
			answer(f, int(a[0]), "", "")
			if a[1] > 0 {
				f.Header.Set("Retry-After", decimal(max(1, a[1]/int64(time.Second))))
			}
		}},
		"late": {args: []arg{{unit: duration}}, do: func(_ *Player, a [2]int64, f *netmodel.Fault, _ *http.Request) {
			f.Wait += time.Duration(a[0])
		}},
		"hang headers": {do: func(_ *Player, _ [2]int64, f *netmodel.Fault, _ *http.Request) {
			f.Wait = forever
		}},
		"drop": {do: func(_ *Player, _ [2]int64, f *netmodel.Fault, _ *http.Request) {
			f.Drop = true
		}},
		"refuse": {lasts: true},
		"page": {do: func(_ *Player, _ [2]int64, f *netmodel.Fault, _ *http.Request) {
			answer(f, http.StatusOK, "text/html", "<!DOCTYPE html><title>Welcome</title><p>Please accept the terms of this network.\n")
		}},

		// An answer that ends badly.
		"slow": {args: []arg{{unit: size}}, do: func(_ *Player, a [2]int64, f *netmodel.Fault, _ *http.Request) {
			if rate := float64(a[0]); f.Rate == 0 || rate < f.Rate {
				f.Rate = rate
			}
		}},
		"hang body": {args: []arg{{unit: size, word: "at"}}, do: func(_ *Player, a [2]int64, f *netmodel.Fault, _ *http.Request) {
			at(f, a[0])
			f.Stall = forever
		}},
		"cut": {args: []arg{{unit: size, word: "at"}}, do: func(_ *Player, a [2]int64, f *netmodel.Fault, _ *http.Request) {
			at(f, a[0])
			f.Truncate = true
		}},
		"reset": {args: []arg{{unit: size, word: "at"}}, do: func(_ *Player, a [2]int64, f *netmodel.Fault, _ *http.Request) {
			at(f, a[0])
			f.Reset, f.Truncate = true, true
			f.Drop = f.Drop || a[0] == 0
		}},

		// An answer that is not what was asked for.
		"short": {args: []arg{{size, "by", 1}}, do: func(_ *Player, a [2]int64, f *netmodel.Fault, _ *http.Request) {
			change(f, func(resp *http.Response) { shorten(resp, a[0]) })
		}},
		"long": {args: []arg{{size, "by", 1}}, do: func(_ *Player, a [2]int64, f *netmodel.Fault, _ *http.Request) {
			change(f, func(resp *http.Response) { lengthen(resp, a[0]) })
		}},
		"flip": {args: []arg{{size, "each", 64e3}}, do: func(_ *Player, a [2]int64, f *netmodel.Fault, _ *http.Request) {
			change(f, func(resp *http.Response) { resp.Body = &flipped{resp.Body, a[0], 0} })
		}},
		"zeros": {do: func(_ *Player, _ [2]int64, f *netmodel.Fault, _ *http.Request) {
			change(f, func(resp *http.Response) { resp.Body = zeros{resp.Body} })
		}},
		"other bytes": {do: func(_ *Player, _ [2]int64, f *netmodel.Fault, r *http.Request) { elsewhere(f, r, false) }},
		"wrong range": {do: func(_ *Player, _ [2]int64, f *netmodel.Fault, r *http.Request) { elsewhere(f, r, true) }},
		"no range": {do: func(_ *Player, _ [2]int64, f *netmodel.Fault, _ *http.Request) {
			change(f, func(resp *http.Response) { resp.Header.Del("Content-Range") })
		}},
		"ignore range": {do: func(_ *Player, _ [2]int64, f *netmodel.Fault, _ *http.Request) {
			ask(f, func(r *http.Request) { r.Header.Del("Range") })
		}},
		"encoded": {do: func(_ *Player, _ [2]int64, f *netmodel.Fault, _ *http.Request) {
			change(f, func(resp *http.Response) { resp.Header.Set("Content-Encoding", "gzip") })
		}},

		// What has to be renewed.
		"tokens": {args: []arg{{unit: duration}, {code, "then", http.StatusUnauthorized}}, do: func(p *Player, a [2]int64, f *netmodel.Fault, r *http.Request) {
			p.doors.token(f, r, time.Duration(a[0]), int(a[1]))
		}},
		"signed": {args: []arg{{unit: duration}, {code, "then", http.StatusForbidden}}, do: func(p *Player, a [2]int64, f *netmodel.Fault, r *http.Request) {
			p.doors.redirect(f, r, time.Duration(a[0]), int(a[1]))
		}},

		// The node's disk.
		"disk full":         {disk: true},
		"disk read errors":  {disk: true},
		"disk write errors": {disk: true},
		"disk hangs":        {disk: true},
		"disk read-only":    {disk: true},
		"quota":             {disk: true, args: []arg{{unit: size}}},
	}
}

// answer has a request answered without the registry, unless it is already.
func answer(f *netmodel.Fault, status int, contentType, body string) {
	if f.Status != 0 {
		return
	}
	f.Status, f.Header, f.Body = status, http.Header{}, []byte(body)
	if contentType != "" {
		f.Header.Set("Content-Type", contentType)
	}
}

// at makes what happens in the body happen at the earliest of the places.
func at(f *netmodel.Fault, n int64) {
	if !f.Truncate && f.Stall == 0 || n < f.After {
		f.After = n
	}
}

func ask(f *netmodel.Fault, then func(*http.Request)) {
	first := f.Ask
	f.Ask = func(r *http.Request) {
		if first != nil {
			first(r)
		}
		then(r)
	}
}

// change has an answer changed, if it is one of an object.
func change(f *netmodel.Fault, then func(*http.Response)) {
	first := f.Answer
	f.Answer = func(resp *http.Response) {
		if first != nil {
			first(resp)
		}
		if resp.StatusCode == http.StatusOK || resp.StatusCode == http.StatusPartialContent {
			then(resp)
		}
	}
}
