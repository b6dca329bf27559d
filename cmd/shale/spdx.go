package main

import (
	"context"
	"crypto/sha1"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"os"
	"strings"
	"syscall"
	"time"

	"github.com/shale-image/shale/trace"
)

// The SPDX 2.3 document, as far as it is of use here: spdx.github.io/spdx-spec/v2.3.
type (
	spdxDocument struct {
		Version       string             `json:"spdxVersion"`
		License       string             `json:"dataLicense"`
		ID            string             `json:"SPDXID"`
		Name          string             `json:"name"`
		Namespace     string             `json:"documentNamespace"`
		Comment       string             `json:"comment"`
		Creation      spdxCreation       `json:"creationInfo"`
		Packages      []spdxPackage      `json:"packages"`
		Files         []spdxFile         `json:"files"`
		Relationships []spdxRelationship `json:"relationships"`
	}
	spdxCreation struct {
		Created  string   `json:"created"`
		Creators []string `json:"creators"`
	}
	spdxPackage struct {
		Name     string `json:"name"`
		ID       string `json:"SPDXID"`
		Version  string `json:"versionInfo,omitempty"`
		Download string `json:"downloadLocation"`
		Analyzed bool   `json:"filesAnalyzed"`
		Purpose  string `json:"primaryPackagePurpose,omitempty"`
		Comment  string `json:"comment,omitempty"`
	}
	spdxFile struct {
		Name      string         `json:"fileName"`
		ID        string         `json:"SPDXID"`
		Checksums []spdxChecksum `json:"checksums"`
		Comment   string         `json:"comment,omitempty"`
	}
	spdxChecksum struct {
		Algorithm string `json:"algorithm"`
		Value     string `json:"checksumValue"`
	}
	spdxRelationship struct {
		From    string `json:"spdxElementId"`
		Type    string `json:"relationshipType"`
		To      string `json:"relatedSpdxElement"`
		Comment string `json:"comment,omitempty"`
	}
)

// printSPDX writes a document of the image, the packages and files that were read,
// and the packages that were not, which say so. The same traces make the same
// document.
func printSPDX(ctx context.Context, w io.Writer, root *os.Root, a *accessed, t *trace.Trace) error {
	const document, whole = "SPDXRef-DOCUMENT", "SPDXRef-Image"
	_, sum, _ := strings.Cut(a.ManifestDigest, ":")
	created := time.Unix(0, 0).UTC()
	if n := len(t.Runs); n > 0 {
		created = t.Runs[n-1].Started.UTC()
	}
	d := spdxDocument{
		Version: "SPDX-2.3", License: "CC0-1.0", ID: document, Name: a.Ref,
		Namespace: fmt.Sprintf("https://github.com/shale-image/shale/accessed/%s-%d", sum, created.Unix()),
		Comment:   fmt.Sprintf("What %d runs of the image have read.", a.Runs),
		Creation:  spdxCreation{created.Format("2006-01-02T15:04:05Z"), []string{"Tool: shale-" + version}},
		Packages:  []spdxPackage{{Name: a.Ref, ID: whole, Version: a.ManifestDigest, Download: "NOASSERTION", Purpose: "CONTAINER"}},
		Files:     []spdxFile{}, Relationships: []spdxRelationship{{document, "DESCRIBES", whole, ""}},
	}
	ids := map[string]string{}
	for i, p := range a.Packages {
		id := fmt.Sprintf("SPDXRef-Package-%d", i)
		if ids[p.Name] == "" {
			ids[p.Name] = id
		}
		d.Packages = append(d.Packages, spdxPackage{Name: p.Name, ID: id, Version: p.Version, Download: "NOASSERTION",
			Comment: fmt.Sprintf("access: %s; %d of %d files, %d of %d bytes were read", p.Status, p.ReadFiles, p.Files, p.ReadBytes, p.Size)})
		d.Relationships = append(d.Relationships, spdxRelationship{whole, "CONTAINS", id, ""})
	}
	for i, f := range a.Files {
		if err := ctx.Err(); err != nil {
			return err
		}
		sums, err := checksums(ctx, root, f.Path)
		if err != nil {
			return fmt.Errorf("%s: %w", f.Path, err)
		}
		x := spdxFile{Name: "./" + f.Path, ID: fmt.Sprintf("SPDXRef-File-%d", i), Checksums: sums,
			Comment: fmt.Sprintf("access: %d of %d bytes were read", f.ReadBytes, f.Size)}
		if f.Others > 0 {
			x.Comment += fmt.Sprintf(", or of one of %d others with the same content", f.Others)
		}
		d.Files = append(d.Files, x)
		owners := []string{whole}
		if len(f.Packages) > 0 {
			owners = nil
			for _, p := range f.Packages {
				owners = append(owners, ids[p])
			}
		}
		for _, o := range owners { // one that CONTAINS files has to list all of them
			d.Relationships = append(d.Relationships, spdxRelationship{o, "OTHER", x.ID, "a file of it that was read"})
		}
	}
	return printJSON(w, d)
}

// checksums reads a file; SPDX wants its SHA-1. What is no regular file could keep it
// for ever, and is an error.
func checksums(ctx context.Context, root *os.Root, name string) ([]spdxChecksum, error) {
	f, err := root.OpenFile(name, os.O_RDONLY|syscall.O_NONBLOCK, 0)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	if st, err := f.Stat(); err != nil || !st.Mode().IsRegular() {
		return nil, errors.Join(err, fmt.Errorf("%s is no regular file", name))
	}
	a, b := sha1.New(), sha256.New()
	if _, err := io.Copy(io.MultiWriter(a, b), until{ctx, f}); err != nil {
		return nil, err
	}
	return []spdxChecksum{{"SHA1", hex.EncodeToString(a.Sum(nil))}, {"SHA256", hex.EncodeToString(b.Sum(nil))}}, nil
}

// until is a reader until a context ends.
type until struct {
	ctx context.Context
	r   io.Reader
}

func (u until) Read(p []byte) (int, error) {
	if err := u.ctx.Err(); err != nil {
		return 0, err
	}
	return u.r.Read(p)
}
