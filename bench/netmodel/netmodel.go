// Package netmodel makes loopback behave like a network: an HTTP proxy in
// front of a registry that delays every request, lets all responses share one
// bandwidth, counts, and on request lies.
//
//	p, err := netmodel.Start(registryURL, netmodel.Default)
//	defer p.Close()
//	... pull from p.Host() ...
//	fmt.Println(p.Totals())
//
// The model is of one client behind one link: a request is answered after Delay,
// which stands for the whole round trip and for what the registry needs of it
// (Debian's takes 2 to 13 ms on two busy cores); responses then queue for the
// link, 16 KiB at a time. Requests and connection set-up cost no bandwidth. Of
// registries it knows HTTP, and what a blob's path looks like.
package netmodel

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"net/url"
	"slices"
	"sync"
	"time"
)

// Model is how good the network is.
type Model struct {
	Delay     time.Duration // from a request to its answer, at least
	Bandwidth float64       // of all responses together, in bits a second; 0 is no limit
	Edge      bool          // blobs come from memory, and take the registry's time once
}

// Default is the network that published numbers are of: 5 ms, 100 Mbit/s.
// The registry's machine is not the node's, so blobs do not take its time again
// and again.
var Default = Model{Delay: 5 * time.Millisecond, Bandwidth: 100e6, Edge: true}

// Request is what the proxy notes of one request.
type Request struct {
	Method, Path, Range string        // Range as in the header, or ""
	Status              int           // 0 if the client got no answer
	Down, Up            int64         // body bytes given to and taken from the client
	Start               time.Duration // since the last Reset
	FirstByte           time.Duration // from Start to the first body byte; 0 if there was none
	Total               time.Duration // from Start to the last
}

// Totals sums up requests.
type Totals struct {
	Requests int
	Down, Up int64 // body bytes
}

func (t Totals) String() string {
	return fmt.Sprintf("%d requests, %.2f MB down, %.2f MB up", t.Requests, float64(t.Down)/1e6, float64(t.Up)/1e6)
}

// Proxy is a running model. Its methods are safe for concurrent use.
type Proxy struct {
	model     Model
	target    *url.URL
	link      link
	transport *http.Transport
	origin    http.RoundTripper // transport, or an edge in front of it
	server    *http.Server
	addr      string
	stop      context.CancelFunc // ends waits of handlers

	refusing sync.Mutex
	listener net.Listener // nil while connections are refused
	held     int          // the socket that holds the port then

	mu     sync.Mutex
	epoch  time.Time
	log    []Request
	faults func(*http.Request) *Fault
	conns  map[net.Conn]bool
}

// Start serves target ("http://127.0.0.1:5000") on a free loopback port until
// Close.
func Start(target string, m Model) (*Proxy, error) {
	u, err := url.Parse(target)
	if err != nil || u.Host == "" {
		return nil, fmt.Errorf("netmodel: %q is no URL of a server", target)
	}
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return nil, fmt.Errorf("netmodel: %w", err)
	}
	ctx, stop := context.WithCancel(context.Background())
	p := &Proxy{
		model:     m,
		target:    u,
		link:      link{rate: m.Bandwidth / 8},
		transport: &http.Transport{DisableCompression: true, MaxIdleConnsPerHost: 64},
		addr:      l.Addr().String(),
		listener:  l,
		stop:      stop,
		epoch:     time.Now(),
		conns:     map[net.Conn]bool{},
	}
	p.origin = p.transport
	if m.Edge {
		p.origin = &edge{registry: p.transport, blobs: map[string]*edgeBlob{}}
	}
	p.server = &http.Server{
		Handler:     http.HandlerFunc(p.serve),
		BaseContext: func(net.Listener) context.Context { return ctx },
		ConnState:   p.connState,
	}
	go p.server.Serve(l)
	return p, nil
}

// Host returns the proxy's address, "127.0.0.1:<port>".
func (p *Proxy) Host() string { return p.addr }

// URL returns "http://" and the proxy's address.
func (p *Proxy) URL() string { return "http://" + p.Host() }

// Close breaks off what is in flight and frees the port.
func (p *Proxy) Close() error {
	p.stop()
	err := errors.Join(p.server.Close(), p.letGo())
	p.transport.CloseIdleConnections()
	return err
}

// SetFaults has every request from now on ask f for its fate; f runs
// concurrently. A nil f, or one that returns nil, lets requests be.
func (p *Proxy) SetFaults(f func(*http.Request) *Fault) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.faults = f
}

// Reset forgets all requests so far and makes now the time that Start of later
// ones counts from.
func (p *Proxy) Reset() {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.log, p.epoch = nil, time.Now()
}

// Log returns the finished requests since the last Reset, by their start.
func (p *Proxy) Log() []Request {
	p.mu.Lock()
	log := slices.Clone(p.log)
	p.mu.Unlock()
	slices.SortStableFunc(log, func(a, b Request) int { return cmp.Compare(a.Start, b.Start) })
	return log
}

// Totals returns the sums over Log.
func (p *Proxy) Totals() Totals {
	p.mu.Lock()
	defer p.mu.Unlock()
	var t Totals
	for _, r := range p.log {
		t.Requests++
		t.Down += r.Down
		t.Up += r.Up
	}
	return t
}

func (p *Proxy) serve(w http.ResponseWriter, r *http.Request) {
	start := time.Now()
	e := &exchange{start: start, request: Request{
		Method: r.Method, Path: r.URL.Path, Range: r.Header.Get("Range"),
	}}
	p.mu.Lock()
	epoch, faults := p.epoch, p.faults
	p.mu.Unlock()
	e.request.Start = start.Sub(epoch)
	if faults != nil {
		if f := faults(r); f != nil {
			e.fault = *f
		}
	}
	err := p.forward(w, r, e)

	e.request.Total = time.Since(start)
	p.mu.Lock()
	if p.epoch.Equal(epoch) { // else it belongs to what Reset forgot
		p.log = append(p.log, e.request)
	}
	p.mu.Unlock()
	if err != nil {
		if e.fault.Reset {
			reset(w)
		}
		// The headers are out: only a broken connection tells the client.
		panic(http.ErrAbortHandler)
	}
}

// reset has the connection end by a reset.
func reset(w http.ResponseWriter) {
	conn, _, err := http.NewResponseController(w).Hijack()
	if err != nil {
		return
	}
	if c, ok := conn.(*net.TCPConn); ok {
		c.SetLinger(0)
	}
	conn.Close()
}

// errBroken is any reason to break the connection off.
var errBroken = errors.New("connection broken off")

// forward answers one request. After an error the connection is of no use.
func (p *Proxy) forward(w http.ResponseWriter, r *http.Request, e *exchange) error {
	ctx := r.Context()
	if err := sleep(ctx, e.fault.Wait); err != nil {
		return err
	}
	if e.fault.Drop {
		return errBroken
	}
	if s := e.fault.Status; s != 0 {
		if err := sleep(ctx, p.model.Delay); err != nil {
			return err
		}
		for k, v := range e.fault.Header {
			w.Header()[k] = v
		}
		e.request.Status = s
		w.WriteHeader(s)
		n, err := w.Write(e.fault.Body)
		e.request.Down = int64(n)
		return err
	}
	out := p.outgoing(r, e)
	if e.fault.Ask != nil {
		e.fault.Ask(out)
	}
	resp, err := p.origin.RoundTrip(out)
	if err != nil {
		e.request.Status = http.StatusBadGateway
		http.Error(w, err.Error(), http.StatusBadGateway)
		return nil
	}
	if e.fault.Answer != nil {
		e.fault.Answer(resp)
	}
	defer resp.Body.Close()
	if err := sleep(ctx, p.model.Delay-time.Since(e.start)+e.fault.Wait); err != nil {
		return err
	}
	header := w.Header()
	for k, v := range resp.Header {
		if !hopByHop[k] {
			header[k] = v
		}
	}
	e.request.Status = resp.StatusCode
	w.WriteHeader(resp.StatusCode)
	if r.Method == http.MethodHead {
		return nil
	}
	return e.copy(ctx, w, resp, sender{link: &p.link})
}

// outgoing returns the request to the registry. It keeps the Host the client
// asked for, if that is this machine: registries build the Location of uploads
// from it. Others know themselves by their own name.
func (p *Proxy) outgoing(r *http.Request, e *exchange) *http.Request {
	out := r.Clone(r.Context())
	out.URL.Scheme, out.URL.Host = p.target.Scheme, p.target.Host
	if addr, err := netip.ParseAddr(p.target.Hostname()); err != nil || !addr.IsLoopback() {
		out.Host = p.target.Host
	}
	out.RequestURI = ""
	out.Close = false
	for k := range hopByHop {
		out.Header.Del(k)
	}
	if r.ContentLength == 0 {
		out.Body = nil // else the transport would send it chunked
	} else {
		out.Body = struct {
			io.Reader
			io.Closer
		}{&counter{r.Body, &e.request.Up}, r.Body}
	}
	return out
}

// hopByHop are the headers that belong to a connection, not to a message.
var hopByHop = map[string]bool{
	"Connection": true, "Keep-Alive": true, "Proxy-Connection": true, "Te": true,
	"Trailer": true, "Transfer-Encoding": true, "Upgrade": true,
}

type counter struct {
	r io.Reader
	n *int64
}

func (c *counter) Read(p []byte) (int, error) {
	n, err := c.r.Read(p)
	*c.n += int64(n)
	return n, err
}
