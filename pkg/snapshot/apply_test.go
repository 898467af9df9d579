package snapshot_test

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"golang.org/x/sys/unix"

	"github.com/ondol-dev/ondol/internal/imagetest"
	"github.com/ondol-dev/ondol/pkg/snapshot"
)

// TestApplyHostile unpacks tars that try to get out. The directory beside the
// tree must stay as it was, whether the tar is refused or defused.
func TestApplyHostile(t *testing.T) {
	imagetest.NeedRoot(t)
	for _, tt := range []struct {
		name    string
		entries []imagetest.Entry
		wantErr string // "" if it must unpack
	}{
		{"dot dot", []imagetest.Entry{file("../outside/f", "x"), file("a/../../outside/g", "x")}, ""},
		{"absolute", []imagetest.Entry{file("/OUT/f", "x")}, ""},
		{"through symlink", []imagetest.Entry{symlink("l", "OUT"), file("l/f", "x")}, ""},
		{"through relative symlink", []imagetest.Entry{symlink("l", "../outside"), file("l/f", "x")}, ""},
		{"through chain of symlinks", []imagetest.Entry{dir("d"), symlink("d/up", ".."), symlink("l", "d/up/../../outside"), file("l/f", "x")}, ""},
		{"symlink in place of a directory", []imagetest.Entry{dir("d"), file("d/x", "1"), symlink("d", "OUT"), file("d/f", "x")}, ""},
		{"overwrite through symlink", []imagetest.Entry{symlink("f", "OUT/secret"), file("f", "x")}, ""},
		{"hard link out", []imagetest.Entry{link("f", "../outside/secret"), file("f", "x")}, "hard link to"},
		{"hard link through symlink", []imagetest.Entry{symlink("l", "OUT"), link("f", "l/secret")}, "hard link to"},
		{"hard link to symlink out, then written", []imagetest.Entry{symlink("l", "OUT/secret"), link("f", "l"), file("f", "x")}, ""},
		{"whiteout out", []imagetest.Entry{file("../outside/.wh.secret", ""), symlink("l", "OUT"), file("l/.wh.secret", "")}, ""},
		{"whiteout of dots", []imagetest.Entry{file(".wh...", "")}, "invalid whiteout"},
		{"opaque root", []imagetest.Entry{file(".wh..wh..opq", "")}, "cannot be opaque"},
		{"symlink loop", []imagetest.Entry{symlink("a", "b"), symlink("b", "a"), file("a/f", "x")}, "symlinks"},
		{"below a file", []imagetest.Entry{file("f", "x"), file("f/g", "x")}, "not a directory"},
		{"overlay attribute", []imagetest.Entry{dir("d", imagetest.Xattr("user.overlay.redirect", "/etc"), imagetest.Xattr("trusted.overlay.opaque", "y"))}, ""},
		{"fake whiteout device", []imagetest.Entry{imagetest.Device("f", 0, 0)}, "0:0"},
		{"owner out of range", []imagetest.Entry{file("f", "x", imagetest.Owner(-1, 0))}, "out of range"},
		{"long name", []imagetest.Entry{file(strings.Repeat("n", 256), "x")}, "name too long"},
		{"deep", []imagetest.Entry{file(strings.Repeat("d/", 3000)+"f", "x")}, "name too long"},
		{"deep, but not too deep", []imagetest.Entry{file(strings.Repeat("d/", 2000)+"f", "x")}, ""},
	} {
		t.Run(tt.name, func(t *testing.T) {
			top := t.TempDir()
			outside, tree := filepath.Join(top, "outside"), filepath.Join(top, "tree")
			for _, err := range []error{os.Mkdir(outside, 0o755), os.Mkdir(tree, 0o755), os.WriteFile(outside+"/secret", []byte("secret"), 0o600)} {
				if err != nil {
					t.Fatal(err)
				}
			}
			for i := range tt.entries {
				e := &tt.entries[i]
				e.Name, e.Linkname = strings.Replace(e.Name, "/OUT", outside, 1), strings.Replace(e.Linkname, "OUT", outside, 1)
			}
			_, err := snapshot.Apply(t.Context(), bytes.NewReader(imagetest.Tar(tt.entries...)), tree, snapshot.ApplyOptions{})
			if tt.wantErr == "" && err != nil || tt.wantErr != "" && (err == nil || !strings.Contains(err.Error(), tt.wantErr)) {
				t.Errorf("error %v, want %q", err, tt.wantErr)
			}
			names, _ := os.ReadDir(outside)
			b, _ := os.ReadFile(outside + "/secret")
			if len(names) != 1 || string(b) != "secret" {
				t.Errorf("the tar got out: %v, %q", names, b)
			}
			for _, x := range []string{"user.overlay.redirect", "trusted.overlay.opaque"} {
				if _, err := unix.Getxattr(tree+"/d", x, nil); err == nil {
					t.Errorf("%s was taken from the tar", x)
				}
			}
		})
	}
}

func TestApplyLastCounts(t *testing.T) {
	imagetest.NeedRoot(t)
	var many []imagetest.Entry
	for i := range 200 {
		many = append(many, file("f", fmt.Sprint(i)), file("g", strings.Repeat(fmt.Sprint(i%10), 300<<10)))
	}
	tree, a := apply(t, imagetest.Tar(append(many,
		file("d", "x"), dir("d"), file("d/y", "1"), file("h", "x"), link("i", "h"), file("h", "y"),
		dir("r"), file("r/x", "1"), file("r", "2"),
	)...), nil)
	want := `d dir 0755 0:0
d/y file 0644 0:0 1700000000 "1"
f file 0644 0:0 1700000000 "199"
h file 0644 0:0 1700000000 "y"
i file 0644 0:0 1700000000 "x"
r file 0644 0:0 1700000000 "2"
`
	got := describe(t, snapshot.NewTreeView([]string{tree}))
	g := strings.Index(got, "g file")
	got = got[:g] + got[g+strings.IndexByte(got[g:], '\n')+1:]
	diff(t, "tree", got, want)
	if b, _ := os.ReadFile(tree + "/g"); len(b) != 300<<10 || b[0] != '9' {
		t.Errorf("g has %d bytes of %q", len(b), b[0])
	}
	if n := a.TOC.Len(); n != 7 {
		t.Errorf("table has %d entries:\n%s", n, tocString(a.TOC))
	}
}

func TestUnpackVerifies(t *testing.T) {
	imagetest.NeedRoot(t)
	plain := imagetest.Tar(file("f", "x"))
	blob := imagetest.Gzip(plain)
	good := ocispec.Descriptor{MediaType: ocispec.MediaTypeImageLayerGzip, Digest: digest.FromBytes(blob), Size: int64(len(blob))}
	other := good
	other.Digest = digest.FromString("other")
	short := good
	short.Size--
	foreign := good
	foreign.MediaType = "text/plain"
	broken := append(bytes.Clone(blob[:len(blob)/2]), blob[len(blob)/2+1:]...)
	for _, tt := range []struct {
		name   string
		desc   ocispec.Descriptor
		blob   []byte
		diffID digest.Digest
		want   error
		text   string
	}{
		{"right", good, blob, digest.FromBytes(plain), nil, ""},
		{"diff ID not known", good, blob, "", nil, ""},
		{"wrong digest", other, blob, "", snapshot.ErrDigest, "it is sha256:"},
		{"wrong size", short, blob, "", snapshot.ErrDigest, "size"},
		{"wrong diff ID", good, blob, digest.FromString("other"), snapshot.ErrDigest, "diff ID"},
		{"damaged", good, broken, "", snapshot.ErrDigest, ""},
		{"cut short", good, blob[:len(blob)-9], "", snapshot.ErrDigest, ""},
		{"not a layer", foreign, blob, "", nil, "unknown media type"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			_, found, err := snapshot.Unpack(t.Context(), bytes.NewReader(tt.blob), tt.desc, tt.diffID, t.TempDir(), snapshot.ApplyOptions{})
			if tt.want == nil && tt.text == "" {
				if err != nil || found != digest.FromBytes(plain) {
					t.Errorf("diff ID %s, error %v", found, err)
				}
				return
			}
			if err == nil || tt.want != nil && !errors.Is(err, tt.want) || !strings.Contains(err.Error(), tt.text) {
				t.Errorf("error %v, want %v %q", err, tt.want, tt.text)
			}
		})
	}
}

func TestDecompress(t *testing.T) {
	plain := bytes.Repeat([]byte("layer "), 100_000)
	for _, c := range []snapshot.Compression{{}, {Kind: "gzip", Level: 1}, {Kind: "zstd"}, {Kind: "zstd", Level: 19}, {Kind: "none"}} {
		var b bytes.Buffer
		w, err := snapshot.NewLayerWriter(&b, c)
		if err != nil {
			t.Fatal(err)
		}
		w.Write(plain)
		if err := w.Close(); err != nil {
			t.Fatal(err)
		}
		if d := w.Descriptor(); d.Digest != digest.FromBytes(b.Bytes()) || d.Size != int64(b.Len()) || w.DiffID() != digest.FromBytes(plain) {
			t.Errorf("%+v: descriptor %+v, diff ID %s", c, d, w.DiffID())
		}
		r, err := snapshot.Decompress(&b, c.MediaType())
		if err != nil {
			t.Fatal(err)
		}
		var out bytes.Buffer
		if _, err := out.ReadFrom(r); err != nil || !bytes.Equal(out.Bytes(), plain) {
			t.Errorf("%+v: %d bytes came back, %v", c, out.Len(), err)
		}
		r.Close()
	}
	if _, err := snapshot.NewLayerWriter(nil, snapshot.Compression{Kind: "lzma"}); err == nil {
		t.Error("an unknown compression was taken")
	}
}
