package snapshot_test

import (
	"archive/tar"
	"bytes"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/ondol-dev/ondol/pkg/snapshot"
)

// TestWriteLayerBytes pins what a layer's tar looks like: other builders write
// the same headers for the same files.
func TestWriteLayerBytes(t *testing.T) {
	d := snapshot.NewDraft(snapshot.Empty)
	const ns = 1_700_000_000_999_999_999
	for _, e := range []snapshot.Entry{
		{Path: "d", Type: snapshot.Dir, Mode: 0o1777, ModTime: ns},
		{Path: "d/f", Type: snapshot.File, Mode: 0o4755, UID: 1, GID: 2, Size: 1, ModTime: ns, Inode: 7, Xattrs: map[string]string{snapshot.Capability: "c", "user.note": "n"}},
		{Path: "d/g", Type: snapshot.File, Mode: 0o4755, UID: 1, GID: 2, Size: 1, ModTime: ns, Inode: 7},
		{Path: "d/l", Type: snapshot.Symlink, Mode: 0o777, Link: "f", ModTime: -1},
		{Path: "d.x", Type: snapshot.Fifo, Mode: 0o600},
	} {
		if err := d.Put(e, mem("x"), "f"); err != nil {
			t.Fatal(err)
		}
	}
	changes, err := d.Changes(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	layer, _ := writeLayer(t, changes)
	var got strings.Builder
	tr := tar.NewReader(bytes.NewReader(layer))
	for {
		h, err := tr.Next()
		if err == io.EOF {
			break
		}
		if err != nil {
			t.Fatal(err)
		}
		fmt.Fprintf(&got, "%c %s %04o %d:%d %q%q %d %s %v\n", h.Typeflag, h.Name, h.Mode, h.Uid, h.Gid, h.Uname, h.Gname, h.ModTime.Unix(), h.Linkname, h.PAXRecords)
	}
	want := `5 d/ 1777 0:0 """" 1700000000  map[]
0 d/f 4755 1:2 """" 1700000000  map[SCHILY.xattr.security.capability:c]
1 d/g 4755 1:2 """" 1700000000 d/f map[]
2 d/l 0777 0:0 """" -1 f map[mtime:-1]
6 d.x 0600 0:0 """" 0  map[]
`
	diff(t, "headers", got.String(), want)
}

func TestWriteLayerContentChanged(t *testing.T) {
	dir := t.TempDir()
	for name, size := range map[string]int{"small": 10, "large": 1 << 20} {
		if err := os.WriteFile(filepath.Join(dir, name), bytes.Repeat([]byte("x"), size), 0o644); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(filepath.Join(dir, name+"2"), bytes.Repeat([]byte("x"), size), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	v := snapshot.NewDirView(dir, nil)
	for _, name := range []string{"small", "large"} {
		e, err := v.Lstat(name)
		if err != nil {
			t.Fatal(err)
		}
		grown, shrunk, other := e, e, e
		grown.Size--
		shrunk.Size++
		other.Digest = sha256.Sum256([]byte("other"))
		for what, e := range map[string]snapshot.Entry{"grown": grown, "shrunk": shrunk, "other": other} {
			second := e
			second.Path += "2"
			_, err := snapshot.WriteLayer(t.Context(), io.Discard, []snapshot.Change{{Entry: e, From: v, FromPath: name}, {Entry: second, From: v, FromPath: name + "2"}})
			if !errors.Is(err, snapshot.ErrContentChanged) || !strings.Contains(err.Error(), name) {
				t.Errorf("%s %s: %v", name, what, err)
			}
		}
	}
}

// TestCompression checks that the bytes of a layer do not depend on how they
// were handed over.
func TestCompressionIsDeterministic(t *testing.T) {
	r := rand.New(rand.NewPCG(1, 2))
	plain := make([]byte, 5<<20)
	for i := range plain {
		plain[i] = byte(r.IntN(16))
	}
	for _, kind := range []string{"gzip", "zstd"} {
		sums := map[[32]byte]bool{}
		for _, step := range []int{len(plain), 1 << 20, 65_537, 1000} {
			var b bytes.Buffer
			w, err := snapshot.NewLayerWriter(&b, snapshot.Compression{Kind: kind})
			if err != nil {
				t.Fatal(err)
			}
			for rest := plain; len(rest) > 0; rest = rest[min(step, len(rest)):] {
				w.Write(rest[:min(step, len(rest))])
			}
			if err := w.Close(); err != nil {
				t.Fatal(err)
			}
			sums[sha256.Sum256(b.Bytes())] = true
		}
		if len(sums) != 1 {
			t.Errorf("%s: %d different results", kind, len(sums))
		}
	}
}
