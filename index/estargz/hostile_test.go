package estargz_test

import (
	"errors"
	"fmt"
	"slices"
	"strings"
	"testing"

	"github.com/shale-image/shale/chunk"
	"github.com/shale-image/shale/index"
	"github.com/shale-image/shale/index/estargz"
)

const end = 100000 // of what tables here are about

var (
	digestA = chunk.Sum(chunk.SHA256, []byte("a")).String()
	digestB = chunk.Sum(chunk.SHA256, []byte("b")).String()
)

// parse reads a table of the entries, which are JSON with A and B for digests.
func parse(lim index.Limits, entries ...string) (*estargz.Layer, error) {
	list := strings.NewReplacer(`"A"`, `"`+digestA+`"`, `"B"`, `"`+digestB+`"`).Replace(strings.Join(entries, ","))
	return estargz.Parse(strings.NewReader(`{"version":1,"entries":[`+list+`]}`), "layer", estargz.Stored{Codec: chunk.Gzip, End: end}, lim)
}

// refused fails unless err is of its kind, names the layer and says what.
func refused(t *testing.T, what string, err, kind error, says string) {
	t.Helper()
	if !errors.Is(err, kind) || !strings.HasPrefix(err.Error(), "layer: ") || !strings.Contains(err.Error(), says) {
		t.Errorf("%s: %v, want %v with %q", what, err, kind, says)
	}
}

func TestHostileEntries(t *testing.T) {
	long := strings.Repeat("x", 256)
	corrupt, unsupported, limit := index.ErrCorrupt, index.ErrUnsupported, index.ErrLimit
	for entries, want := range map[string]struct {
		kind error
		says string
	}{
		// names
		`{"type":"dir"}`:                                             {corrupt, "an empty name"},
		`{"type":"dir","name":"a/../../b"}`:                          {corrupt, `".." in "a/../../b"`},
		`{"type":"dir","name":"a\u0000b"}`:                           {corrupt, "NUL"},
		`{"type":"dir","name":"` + long + `"}`:                       {corrupt, "more than 255 bytes"},
		`{"type":"dir","name":"` + strings.Repeat("x/", 2100) + `"}`: {corrupt, "more than 4096 bytes"},
		`{"type":"dir","name":"caf\ufffd"}`:                          {unsupported, "not UTF-8"},
		"{\"type\":\"dir\",\"name\":\"caf\xe9\"}":                    {unsupported, "not UTF-8"},
		`{"type":"symlink","name":"l","linkName":"\ufffd"}`:          {unsupported, "not UTF-8"},
		`{"type":"reg","name":"a/.wh.b/c"}`:                          {corrupt, `"a/.wh.b/c" is below a whiteout`},
		`{"type":"reg","name":"a/.wh.."}`:                            {corrupt, `a whiteout of "."`},

		// types
		`{"name":"a"}`:                   {unsupported, `type ""`},
		`{"name":"a","type":"sock"}`:     {unsupported, `"a" is of type "sock"`},
		`null`:                           {corrupt, "empty name"},
		`[]`:                             {corrupt, "entry 0"},
		`{"name":"a","type":"chunk"}`:    {corrupt, "not the file before it"},
		`{"type":"hardlink","name":"a"}`: {corrupt, `hard link "a" to ""`},
		`{"type":"hardlink","name":"a","linkName":"../b"}`: {corrupt, `hard link "a"`},
		`{"type":"symlink","name":"a"}`:                    {corrupt, "a target of 0 bytes"},
		`{"type":"char","name":"a"}`:                       {unsupported, "0:0"},
		`{"type":"block","name":"a","devMajor":4096}`:      {unsupported, "device 4096:0"},
		`{"type":"block","name":"a","devMinor":-1}`:        {unsupported, "device 0:-1"},

		// metadata
		`{"type":"dir","name":"a","uid":-1}`:                               {unsupported, `"a" has uid -1`},
		`{"type":"dir","name":"a","gid":4294967295}`:                       {unsupported, `"a" has gid 4294967295`},
		`{"type":"dir","name":"a","uid":1e99}`:                             {corrupt, "entry 0"},
		`{"type":"dir","name":"a","modtime":"yesterday"}`:                  {corrupt, `"a" was modified at "yesterday"`},
		`{"type":"dir","name":"a","xattrs":{"user.a":"*"}}`:                {corrupt, `"a": the value of attribute "user.a" is no base64`},
		`{"type":"dir","name":"a","xattrs":{"user.overlay.opaque":""}}`:    {unsupported, "user.overlay.opaque"},
		`{"type":"dir","name":"a","xattrs":{"system.nfs4_acl":""}}`:        {unsupported, "system.nfs4_acl"},
		`{"type":"dir","name":"a","xattrs":{"user.a%20b":""}}`:             {unsupported, "user.a%20b"},
		`{"type":"dir","name":"a","xattrs":{"user.a%3D":"","user.a=":""}}`: {corrupt, `"user.a=" twice`},
		`{"type":"dir","name":"a","xattrs":{"user.` + long + `":""}}`:      {corrupt, "extended attribute"},

		// sizes and digests
		`{"type":"reg","name":"a","size":-1}`:                                                          {corrupt, "-1 bytes"},
		`{"type":"reg","name":"a","size":17592186044417}`:                                              {limit, "(FileSize)"},
		`{"type":"reg","name":"a","size":1,"offset":9}`:                                                {unsupported, "without a digest"},
		`{"type":"reg","name":"a","size":1,"offset":9,"chunkDigest":"md5:abc"}`:                        {unsupported, "md5"},
		`{"type":"reg","name":"a","size":1,"offset":9,"chunkDigest":"sha256:abc"}`:                     {corrupt, "sha256:abc"},
		`{"type":"reg","name":"a","size":1,"offset":9,"digest":"A","chunkDigest":"B"}`:                 {corrupt, "want that of the file"},
		`{"type":"reg","name":"a","size":1,"digest":"A"}`:                                              {corrupt, "offset 0 "},
		`{"type":"reg","name":"a","size":1,"digest":"A","offset":100000}`:                              {corrupt, "want 1 to 99999"},
		`{"type":"reg","name":"a","size":1,"digest":"A","offset":9,"innerOffset":-1}`:                  {corrupt, "(-1 in it)"},
		`{"type":"reg","name":"a","size":1,"digest":"A","offset":9,"innerOffset":9223372036854775807}`: {corrupt, "in it"},
		`{"type":"reg","name":"a","size":1,"digest":"A","offset":9,"innerOffset":9223372036854775806}`: {corrupt, "cannot hold"},
		`{"type":"reg","name":"a","size":1,"digest":"A","offset":9,"endOffset":9}`:                     {corrupt, "ends at 9"},
		`{"type":"reg","name":"a","size":1,"digest":"A","offset":9,"endOffset":100001}`:                {corrupt, "ends at 100001"},
		`{"type":"reg","name":"a","size":900000000,"digest":"A","offset":9}`:                           {corrupt, "cannot hold"},
		`{"type":"reg","name":"a","size":16777217,"digest":"A","offset":9}`:                            {unsupported, "chunks of more than 16 MiB"},
		`{"type":"reg","name":"a","size":1,"digest":"A","offset":9,"chunkType":"secret"}`:              {unsupported, "secret"},

		// chunks
		`{"type":"reg","name":"a","size":9000,"offset":9,"chunkSize":4096,"chunkDigest":"A"}`: {corrupt, `"a" has 9000 bytes, but chunks for 4096`},
		`{"type":"reg","name":"a","size":9000,"offset":9,"chunkDigest":"A"},
		 {"type":"chunk","name":"a","offset":19,"chunkOffset":4096,"chunkDigest":"B"}`: {corrupt, "want one at 9000"},
		`{"type":"reg","name":"a","size":9000,"offset":9,"chunkSize":4096,"chunkDigest":"A"},
		 {"type":"chunk","name":"a","offset":19,"chunkOffset":4097,"chunkDigest":"B"}`: {corrupt, "want one at 4096"},
		`{"type":"reg","name":"a","size":9000,"offset":9,"chunkSize":4096,"chunkDigest":"A"},
		 {"type":"chunk","name":"a","offset":19,"chunkOffset":4096,"chunkSize":4905,"chunkDigest":"B"}`: {corrupt, "a chunk of 4905"},
		`{"type":"reg","name":"a","size":9000,"offset":9,"chunkSize":4096,"chunkDigest":"A"},
		 {"type":"chunk","name":"b","offset":19,"chunkOffset":4096,"chunkDigest":"B"}`: {corrupt, `a chunk of "b"`},
		`{"type":"reg","name":"a","size":9000,"offset":9,"chunkSize":4096,"chunkDigest":"A"},
		 {"type":"chunk","name":"a","offset":9,"chunkOffset":4096,"chunkDigest":"B"}`: {corrupt, "share bytes"},
		`{"type":"reg","name":"a","size":9000,"offset":9,"chunkSize":4096,"chunkDigest":"A"},
		 {"type":"chunk","name":"a","offset":9,"innerOffset":4095,"chunkOffset":4096,"chunkDigest":"B"}`: {corrupt, "share bytes"},
		`{"type":"reg","name":"a","size":9000,"offset":9,"chunkSize":4000,"chunkDigest":"A"},
		 {"type":"chunk","name":"a","offset":19,"chunkOffset":4000,"chunkDigest":"B"}`: {unsupported, `"a", 9000 bytes, is cut at offsets`},
		`{"type":"reg","name":"a","size":9000,"offset":19,"chunkSize":4000,"chunkDigest":"A","digest":"A"},
		 {"type":"chunk","name":"a","offset":9,"chunkOffset":4000,"chunkDigest":"B"}`: {unsupported, "is cut at offsets"},
		`{"type":"reg","name":"a","size":9000,"offset":9,"chunkSize":4096,"chunkDigest":"A"},
		 {"type":"chunk","name":"a","offset":19,"chunkOffset":4096}`: {unsupported, "without a digest"},
		`{"type":"reg","name":"a","size":1,"digest":"A","offset":9},{"type":"reg","name":"b","size":2,"digest":"A","offset":19}`:       {corrupt, "has 2 bytes, elsewhere 1"},
		`{"type":"reg","name":"a","size":1,"digest":"A","offset":9},{"type":"reg","name":"b","size":1,"digest":"A","offset":9}`:        {corrupt, "share bytes"},
		`{"type":"reg","name":"a","size":1,"digest":"A","offset":9},{"type":"dir","name":"d"},{"type":"chunk","name":"a","offset":19}`: {corrupt, "not the file before it"},
		`{"type":"reg","name":".wh.a","size":1,"digest":"A","offset":-9}`:                                                              {corrupt, "offset -9"},
	} {
		_, err := parse(index.Limits{}, entries)
		refused(t, entries[:min(len(entries), 200)], err, want.kind, want.says)
	}
}

func TestHostileTables(t *testing.T) {
	for table, want := range map[string]struct {
		kind error
		says string
	}{
		``:                           {index.ErrCorrupt, "EOF"},
		`[]`:                         {index.ErrCorrupt, "want {"},
		`{}`:                         {index.ErrUnsupported, "version 0"},
		`{"version":2,"entries":[]}`: {index.ErrUnsupported, "version 2"},
		`{"version":1}`:              {index.ErrCorrupt, "no list of entries"},
		`{"version":1,"entries":{}}`: {index.ErrCorrupt, "want ["},
		`{"version":1,"entries":[],"entries":[]}`:                            {index.ErrCorrupt, "a second list"},
		`{"version":1,"entries":[]} {}`:                                      {index.ErrCorrupt, "behind the end"},
		`{"version":1,"entries":[]} x`:                                       {index.ErrCorrupt, "invalid character"},
		`{"version":1,"entries":[`:                                           {index.ErrCorrupt, "EOF"},
		`{"version":1,"entries":[{"type":"dir","name":"a"`:                   {index.ErrCorrupt, "EOF"},
		`{"version":1,"entries":[` + strings.Repeat("[", 100000):             {index.ErrCorrupt, "depth"},
		`{"version":1,"x":` + strings.Repeat(" ", 150000) + `,"entries":[]}`: {index.ErrLimit, "(MetadataBytes)"},
	} {
		_, err := estargz.Parse(strings.NewReader(table), "layer", estargz.Stored{Codec: chunk.Gzip, End: end}, index.Limits{MetadataBytes: 150000})
		refused(t, table[:min(len(table), 100)], err, want.kind, want.says)
	}
}

func TestLimits(t *testing.T) {
	dirs := slices.Repeat([]string{`{"type":"dir","name":"a"}`}, 1000)
	for what, lim := range map[string]index.Limits{
		"Entries": {Entries: 999}, "MetadataBytes": {MetadataBytes: 20000},
	} {
		_, err := parse(lim, dirs...)
		refused(t, what, err, index.ErrLimit, "("+what+")")
	}
	if l, err := parse(index.Limits{}, dirs...); err != nil || len(l.Changes) != 1000 {
		t.Error(err)
	}
	_, err := parse(index.Limits{XattrBytes: 10}, `{"type":"dir","name":"a","xattrs":{"user.abcdefg":""}}`)
	refused(t, "XattrBytes", err, index.ErrLimit, "(XattrBytes)")
}

// TestManySpans: a file whose chunks do not fit is one, of as many spans as a chunk may have.
func TestManySpans(t *testing.T) {
	for _, n := range []int{index.MaxSpans, index.MaxSpans + 1} {
		entries := []string{fmt.Sprintf(`{"type":"reg","name":"a","size":%d,"offset":9,"chunkSize":3,"digest":"A","chunkDigest":"B"}`, 3*n)}
		for i := 1; i < n; i++ {
			entries = append(entries, fmt.Sprintf(`{"type":"chunk","name":"a","offset":%d,"chunkOffset":%d,"chunkSize":3,"chunkDigest":"B"}`, 9+10*i, 3*i))
		}
		l, err := parse(index.Limits{}, entries...)
		if n > index.MaxSpans {
			refused(t, "too many spans", err, index.ErrUnsupported, "is cut at offsets")
			continue
		}
		if err != nil {
			t.Fatal(err)
		}
		tree := &index.Tree{Chunks: l.Chunks, Blobs: []index.Blob{{Spans: l.Spans}}}
		if err := tree.CheckChunk(&tree.Chunks[0]); err != nil || len(tree.Chunks) != 1 {
			t.Errorf("%d chunks: %v", len(tree.Chunks), err)
		}
	}
}

// TestLinkToNowhere: what a link means depends on the layers below, so Apply
// tells.
// As aufs makes them whiteouts are links.
func TestWhiteoutIsLink(t *testing.T) {
	l, err := parse(index.Limits{}, `{"type":"hardlink","name":"d/.wh.a","linkName":".wh..wh.aufs"}`)
	if err != nil || len(l.Changes) != 1 || l.Changes[0] != (index.Change{Op: index.Whiteout, Path: "d/a"}) {
		t.Errorf("%+v, %v", l, err)
	}
}

func TestLinkToNowhere(t *testing.T) {
	l, err := parse(index.Limits{}, `{"type":"hardlink","name":"a","linkName":"./b"}`)
	if err != nil {
		t.Fatal(err)
	}
	err = index.NewTree().Apply(l.Changes)
	if !errors.Is(err, index.ErrCorrupt) || !strings.Contains(fmt.Sprint(err), `"b", which does not exist`) {
		t.Error(err)
	}
}

// TestHole: zeros that are cut at blocks need no chunk; and what chunks of a file
// say about others does not matter.
func TestHole(t *testing.T) {
	l, err := parse(index.Limits{},
		`{"type":"reg","name":"h","size":20000000,"offset":9,"chunkSize":4096,"chunkDigest":"A"}`,
		`{"type":"chunk","name":"h","offset":19,"chunkOffset":4096,"chunkSize":8192,"chunkType":"zeros"}`,
		`{"type":"chunk","name":"h","offset":29,"chunkOffset":12288,"chunkSize":8192,"chunkDigest":"B"}`,
		`{"type":"chunk","name":"h","offset":39,"chunkOffset":20480,"chunkType":"zeros"}`,
		`{"type":"dir","name":"d","mode":16877,"modtime":"2001-02-03T04:05:06.5+01:00"}`)
	if err != nil {
		t.Fatal(err)
	}
	h, d := l.Changes[0].Inode, l.Changes[1].Inode
	if want := []index.Extent{{Off: 0, Chunk: 0}, {Off: 12288, Chunk: 1}}; !slices.Equal(h.Extents, want) || len(l.Chunks) != 2 {
		t.Errorf("%v, want %v", h.Extents, want)
	}
	if d.Mode != 0o40755 || d.Mtime != (index.Time{Sec: 981169506, Nsec: 5e8}) {
		t.Errorf("%#o, %v", d.Mode, d.Mtime)
	}
}
