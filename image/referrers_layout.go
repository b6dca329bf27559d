package image

import (
	"context"
	"errors"
	"io/fs"
	"os"
	"slices"
	"strings"
)

func (l *layout) referrers(ctx context.Context, subject string, types []string) ([]Referrer, error) {
	root, err := os.OpenRoot(l.dir)
	if err != nil {
		return nil, unlessMissing(err)
	}
	defer root.Close()
	p, err := l.read(root, "index.json")
	if err != nil {
		return nil, unlessMissing(err)
	}
	w := walk{subject: subject, types: types, limit: l.opts.ManifestLimit, seen: map[string]bool{}}
	w.read = func(digest string) ([]byte, error) { return l.read(root, blobPath(digest)) }
	err = w.visit(ctx, "index.json", p, maxDepth)
	return w.found, err
}

// unlessMissing returns nil for a layout, or an index.json, that is not there:
// it has no referrers, as a repository that is not there has none.
func unlessMissing(err error) error {
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	return err
}

// attach lists an artifact as a registry without an API for that has it listed:
// in an index that index.json has under the tag of the subject's referrers. Who
// knows that tag finds it there, and who follows subjects from all manifests
// finds it too; a copy of the tag to a registry is the list there.
func (l *layout) attach(ctx context.Context, f *referral) error {
	if err := l.pushBytes(ctx, f.d, f.m.Bytes); err != nil {
		return err
	}
	return l.update(func(root *os.Root, index []byte) ([]byte, error) {
		doc, err := parseDocument("index.json", MediaTypeIndex, index)
		if err != nil {
			return nil, err
		}
		tag := referrersTag(f.subject)
		var list []byte
		if i := slices.IndexFunc(doc.Manifests, func(e entry) bool { return e.Annotations[refName] == tag }); i >= 0 {
			e := doc.Manifests[i].Descriptor
			if list, err = l.read(root, blobPath(e.Digest)); err == nil {
				err = checkBytes(e, list)
			}
			if err != nil {
				return nil, err
			}
		}
		if list, err = f.add(tag, list); err != nil || list == nil {
			return nil, err
		}
		d := Descriptor{MediaType: MediaTypeIndex, Digest: digestOf(list), Size: int64(len(list))}
		if err := l.pushBytes(ctx, d, list); err != nil {
			return nil, err
		}
		d.Annotations = map[string]string{refName: tag}
		return setTag(index, d)
	})
}

func blobPath(digest string) string { return blobDir + "/" + strings.TrimPrefix(digest, "sha256:") }

func (a *archive) referrers(ctx context.Context, subject string, types []string) ([]Referrer, error) {
	if err := a.open(); err != nil || a.docker { // which has no manifests
		return nil, err
	}
	p, err := a.readManifest("index.json")
	if err != nil {
		return nil, err
	}
	w := walk{subject: subject, types: types, limit: a.opts.ManifestLimit, seen: map[string]bool{}}
	w.read = func(digest string) ([]byte, error) { return a.readManifest(blobPath(digest)) }
	err = w.visit(ctx, "index.json", p, maxDepth)
	return w.found, err
}

func (a *archive) attach(context.Context, *referral) error { return errReadOnly }
