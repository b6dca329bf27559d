package daemon

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"syscall"
	"time"

	"github.com/shale-image/shale/blob"
	"github.com/shale-image/shale/fill"
	"github.com/shale-image/shale/image"
	"github.com/shale-image/shale/keeper"
	"github.com/shale-image/shale/pool"
)

// ErrBusy says that something is in use and was left alone.
var ErrBusy = errors.New("in use")

// Source says which image is meant and how to get at it. Credentials are
// found by the client, as the user who calls; the service keeps them in memory
// only.
type Source struct {
	Ref         string            `json:"ref"`
	Platform    string            `json:"platform,omitempty"` // default: the node's
	Credentials image.Credentials `json:"credentials"`
	// Environment is where the credentials were found. With it the service has them
	// looked up again, as the user who calls, when the registry refuses them.
	Environment image.Environment `json:"environment,omitempty"`
	// Refresh asks the registry what the reference stands for now, also if
	// the node has an image for it.
	Refresh bool `json:"refresh,omitempty"`
	// IndexTrust is whose index of the image is believed (package reader);
	// default what the node's configuration says.
	IndexTrust string `json:"index_trust,omitempty"`
	// ShareIndex permits the node to push the index that it makes of the image, if it has
	// to, beside the image, with these Credentials.
	ShareIndex bool `json:"share_index,omitempty"`

	// Unasked says that there are no Credentials since LookUp has not been called.
	Unasked bool `json:"unasked,omitempty"`
	// LookUp, if not nil, is called for Credentials when it turns out that the registry
	// has to be asked: it may take its time, and need the network itself. An image that is
	// known, and all here, starts without. missing says that it is known and not all here:
	// then it starts whatever comes of it.
	LookUp func(ctx context.Context, missing bool) (image.Credentials, error) `json:"-"`

	caller *keeper.Peer // who called, as the kernel says; no message can
}

// ErrUnasked says that credentials have to be looked up. It wraps blob.ErrNotFound if the
// node does not know the image.
var ErrUnasked = errors.New("credentials have to be looked up first")

// lookUp has credentials looked up if they have not been.
func (s *Source) lookUp(ctx context.Context, missing bool) (err error) {
	if s.LookUp != nil {
		s.Credentials, err = s.LookUp(ctx, missing)
		s.LookUp, s.Unasked = nil, false
	}
	return err
}

// whenAsked makes a call that may need no credentials.
func (s *Source) whenAsked(ctx context.Context, call func() error) error {
	s.Unasked = s.LookUp != nil
	err := call()
	if s.Unasked && errors.Is(err, ErrUnasked) {
		if err := s.lookUp(ctx, !errors.Is(err, blob.ErrNotFound)); err != nil {
			return err
		}
		err = call()
	}
	return err
}

// by notes who has sent it.
func (s *Source) by(caller keeper.Peer) error {
	s.caller = &caller
	return s.Environment.Check()
}

// Pulled is the result of Pull.
type Pulled struct {
	Ref            string          `json:"ref"`
	ManifestDigest string          `json:"manifest_digest"`
	Platform       string          `json:"platform"`
	Config         json.RawMessage `json:"config"` // the image's config, as stored
	ContentBytes   int64           `json:"content_bytes"`
	MissingBytes   int64           `json:"missing_bytes"` // stored bytes not yet on the node
}

// Progress is told while a call takes its time: bytes done, or something that
// the user should know.
type Progress struct {
	Done  int64  `json:"done,omitempty"` // stored bytes
	Total int64  `json:"total,omitempty"`
	Note  string `json:"note,omitempty"`
}

// Pull makes the node know an image: its index is fetched and linked, its data
// only if complete is true.
func (c *Client) Pull(ctx context.Context, s Source, complete bool, progress func(Progress)) (*Pulled, error) {
	if err := s.lookUp(ctx, false); err != nil {
		return nil, err
	}
	var out Pulled
	_, err := c.call(ctx, "pull", pullArgs{s, complete}, &out, progress)
	if err != nil {
		return nil, err
	}
	return &out, nil
}

type pullArgs struct {
	Source
	Complete bool `json:"complete"`
}

// Mounted is the result of Mount.
type Mounted struct {
	Pulled
	ID   string `json:"id"`
	Face string `json:"face"`
	// FS is a detached mount of the image's root, to be attached with
	// mount.Attach or used as an overlay's lower layer. When nobody holds it,
	// nor anything attached from it, the service takes the mount down. It is
	// nil if the service, being no root's, has mounted the image at Place.Dir.
	FS *os.File `json:"-"`
}

// Mount pulls the image if need be and mounts it.
func (c *Client) Mount(ctx context.Context, s Source, p Place, progress func(Progress)) (*Mounted, error) {
	var out Mounted
	var files []*os.File
	err := s.whenAsked(ctx, func() (err error) {
		files, err = c.call(ctx, "mount", mountArgs{Source: s, Place: p}, &out, progress)
		return err
	})
	if err != nil {
		return nil, err
	}
	switch {
	case len(files) == 1:
		out.FS = files[0]
	case len(files) > 1 || p.Dir == "":
		closeAll(files)
		return nil, fmt.Errorf("node service: %d descriptors came with a mount, want 1", len(files))
	}
	return &out, nil
}

// Place says where and how an image is mounted.
type Place struct {
	Where string `json:"where"`         // what Status says
	Face  string `json:"face"`          // of package mount; "" is mount.FaceAuto
	Dir   string `json:"dir,omitempty"` // where a service that is no root's mounts it; an absolute path

	// ReadAheadKiB is the kernel's readahead; 0 is its default, and with 4 it
	// reads nothing but what it is asked for, so that a trace is exact.
	ReadAheadKiB int `json:"readahead_kib,omitempty"`

	// Command is what the mount is for, for traces and to choose a start pack:
	// what was said behind the image's name; none is the image's own.
	Command    []string `json:"command,omitempty"`
	AnyCommand bool     `json:"any_command,omitempty"` // what will run is not known
	NoPack     bool     `json:"no_pack,omitempty"`     // use no start pack
	Rehearsal  bool     `json:"rehearsal,omitempty"`   // use none, but read as with one: a pack will be made of the trace
	NoComplete bool     `json:"no_complete,omitempty"` // do not fetch the rest in the background
	Unrecorded bool     `json:"unrecorded,omitempty"`  // the mount is no run of the image: what is read is not kept

	// ShareTraces has what was read pushed beside the image when the mount ends,
	// with the mount's credentials (package fleet).
	ShareTraces bool `json:"share_traces,omitempty"`
}

type mountArgs struct {
	Source
	Place
	Quiet bool `json:"quiet,omitempty"` // its readahead is less than usual for the time of its start; not asked for
}

// Abort cuts the mount with this device number (st_dev of its root) off from
// the service: pending reads and reads of what the kernel does not have in
// memory give EIO. An unknown device is blob.ErrNotFound.
func (c *Client) Abort(ctx context.Context, dev uint64) error {
	_, err := c.call(ctx, "abort", deviceArgs{dev}, nil, nil)
	return err
}

// WaitGone returns when the mount with this device number is no more, or ctx
// ends. An unknown device is blob.ErrNotFound.
func (c *Client) WaitGone(ctx context.Context, dev uint64) error {
	_, err := c.call(ctx, "wait", deviceArgs{dev}, nil, nil)
	return err
}

type deviceArgs struct {
	Dev uint64 `json:"dev"`
}

// Status is what the service does and holds.
type Status struct {
	Root      string        `json:"root"`
	Version   string        `json:"version"`
	Processes []Process     `json:"processes"`
	Started   *time.Time    `json:"started,omitempty"`
	Mounts    []MountStatus `json:"mounts"`
	Images    []ImageStatus `json:"images"`
	Pool      *pool.Usage   `json:"pool,omitempty"`
	// Full says that what is fetched cannot be stored: nothing can be evicted, or the
	// disk has failed. Readers are served from memory.
	Full bool `json:"full,omitempty"`
}

// The roles of processes.
const (
	RoleKeeper = "keeper"
	RoleWorker = "worker"
)

// Process is a process of the service.
type Process struct {
	Role string `json:"role"`
	PID  int    `json:"pid"`
}

// MountStatus is one mount.
type MountStatus struct {
	ID             string    `json:"id"`
	Ref            string    `json:"ref"`
	ManifestDigest string    `json:"manifest_digest"`
	Platform       string    `json:"platform"`
	Where          string    `json:"where"`
	Face           string    `json:"face"`
	Since          time.Time `json:"since"`
	Dev            uint64    `json:"dev"`
	ContentBytes   int64     `json:"content_bytes"` // of all chunks of the image
	MissingChunks  int       `json:"missing_chunks"`
	MissingBytes   int64     `json:"missing_bytes"` // stored bytes not yet on the node
	Survives       bool      `json:"survives"`      // the loss of its registry: nothing is missing
	Detached       bool      `json:"detached"`      // from this service: its readers need no process of it
	// Incomplete says why the rest is not fetched, or was not when that was tried last.
	Incomplete string `json:"incomplete,omitempty"`
	// Wrong says how what is mounted differs from the image, if it does: the index
	// it is mounted by was somebody's, and not true.
	Wrong string     `json:"wrong,omitempty"`
	Fill  fill.Stats `json:"fill"`
	// Source is what was asked of the image's repository for it.
	Source SourceStats `json:"source"`
}

// ImageStatus is one image the node knows.
type ImageStatus struct {
	Refs           []string  `json:"refs"` // empty if a later pull gave its name to another
	ManifestDigest string    `json:"manifest_digest"`
	Platform       string    `json:"platform"`
	Pulled         time.Time `json:"pulled"`
}

// Status asks the service. It answers within a second, or as soon after as there is a
// processor for the keeper, and fails after statusTimeout; to start a
// service may take longer. If its worker does not answer, or none is up, the keeper
// says what it knows: then there is no Pool, and of mounts what the worker told it last.
func (c *Client) Status(ctx context.Context) (*Status, error) {
	var out Status
	if c.Start {
		_, err := c.call(ctx, "status", nil, &out, nil)
		return &out, err
	}
	ctx, cancel := context.WithTimeout(ctx, statusTimeout)
	defer cancel()
	first, cancel := context.WithTimeout(ctx, 700*time.Millisecond)
	defer cancel()
	_, err := c.call(first, "status", nil, &out, nil)
	if errors.Is(err, context.DeadlineExceeded) {
		if st, kerr := keeper.Ask(ctx, c.Root); kerr == nil {
			return c.kept(st), nil
		}
	}
	if err != nil {
		return nil, err
	}
	return &out, nil
}

const statusTimeout = 3 * time.Second

// kept is what a keeper says, as a Status.
func (c *Client) kept(st *keeper.Status) *Status {
	out := &Status{
		Root: c.Root, Version: st.Version, Processes: []Process{{RoleKeeper, st.Keeper}},
		Mounts: []MountStatus{}, Images: []ImageStatus{},
	}
	if st.Worker != 0 {
		out.Processes = append(out.Processes, Process{RoleWorker, st.Worker})
	}
	for _, js := range st.Mounts {
		var m MountStatus
		if json.Unmarshal(js, &m) == nil {
			out.Mounts = append(out.Mounts, m)
		}
	}
	sortMounts(out.Mounts)
	return out
}

// Upgrade has the service's worker exchanged for one that runs the program exe,
// while mounts are read. It returns the processes there are then. If the new one
// cannot start the service stays what it was.
func (c *Client) Upgrade(ctx context.Context, exe *os.File) (*Status, error) {
	st, err := keeper.Upgrade(ctx, c.Root, exe)
	switch {
	case errors.Is(err, fs.ErrNotExist) || errors.Is(err, syscall.ECONNREFUSED):
		return nil, ErrNotRunning
	case err != nil:
		return nil, err
	}
	return c.kept(st), nil
}

// Removed is the result of Remove.
type Removed struct {
	Ref        string   `json:"ref"`
	Images     []string `json:"images"` // manifest digests of images that have no name any more
	FreedBytes int64    `json:"freed_bytes"`
}

// Remove takes a reference away from the node, and its image, if it has no
// other name. An image that is mounted is ErrBusy, an unknown one
// blob.ErrNotFound.
func (c *Client) Remove(ctx context.Context, ref string) (*Removed, error) {
	var out Removed
	if _, err := c.call(ctx, "remove", removeArgs{ref}, &out, nil); err != nil {
		return nil, err
	}
	return &out, nil
}

type removeArgs struct {
	Ref string `json:"ref"`
}

// Stop ends the service if nothing is mounted and nothing is being pulled; else
// it is ErrBusy. It returns when the service has ended, with all that it still had
// to write, or ctx has, or it takes longer than two minutes.
func (c *Client) Stop(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, 2*time.Minute)
	defer cancel()
	if _, err := c.call(ctx, "stop", nil, nil, nil); err != nil {
		return err
	}
	for {
		if unlocked(c.Root) { // its socket it may be unable to remove
			return nil
		}
		select {
		case <-time.After(5 * time.Millisecond):
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}
