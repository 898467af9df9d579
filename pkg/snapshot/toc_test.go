package snapshot_test

import (
	"bytes"
	"errors"
	"fmt"
	"slices"
	"testing"

	"github.com/ondol-dev/ondol/pkg/snapshot"
)

func TestTOC(t *testing.T) {
	entries := []snapshot.Entry{
		{Path: "usr/bin/x", Type: snapshot.File, Mode: 0o4755, UID: 1, GID: 1 << 31, Size: 1 << 40, ModTime: -5, Digest: [32]byte{1}},
		{Path: "usr.txt", Type: snapshot.Symlink, Link: "usr/bin/x"},
		{Path: "usr", Type: snapshot.Dir, Mode: 0o755, Opaque: true},
		{Path: "dev/null", Type: snapshot.Char, Major: 1, Minor: 3, Xattrs: map[string]string{"b": "2", "a": "1"}},
		{Path: "usr/gone", Type: snapshot.Whiteout},
	}
	toc, err := snapshot.NewTOC(slices.Clone(entries))
	if err != nil {
		t.Fatal(err)
	}
	again, err := snapshot.DecodeTOC(bytes.Clone(toc.Encode()))
	if err != nil {
		t.Fatal(err)
	}
	want := []string{"dev", "dev/null", "usr", "usr/bin", "usr/bin/x", "usr/gone", "usr.txt"}
	for _, toc := range []*snapshot.TOC{toc, again} {
		var got []string
		for e := range toc.All() {
			got = append(got, e.Path)
			i, ok := toc.Find(e.Path)
			if !ok || fmt.Sprint(toc.At(i)) != fmt.Sprint(e) {
				t.Errorf("Find(%q) = %d, %v", e.Path, i, ok)
			}
			if e.Implicit != (e.Path == "dev" || e.Path == "usr/bin") {
				t.Errorf("%s: implicit %v", e.Path, e.Implicit)
			}
			for _, w := range entries {
				if w.Path == e.Path && fmt.Sprint(w) != fmt.Sprint(e) {
					t.Errorf("got %v, want %v", e, w)
				}
			}
		}
		if !slices.Equal(got, want) {
			t.Errorf("order %q, want %q", got, want)
		}
		for _, p := range []string{"", "us", "usr/", "usr/bin/y", "z"} {
			if _, ok := toc.Find(p); ok {
				t.Errorf("Find(%q) found something", p)
			}
		}
	}
}

func TestDecodeTOCDamaged(t *testing.T) {
	toc, err := snapshot.NewTOC([]snapshot.Entry{{Path: "a/b", Type: snapshot.File}, {Path: "c", Type: snapshot.Symlink, Link: "a"}})
	if err != nil {
		t.Fatal(err)
	}
	good := toc.Encode()
	for n := range good {
		if _, err := snapshot.DecodeTOC(good[:n]); !errors.Is(err, snapshot.ErrDamaged) {
			t.Fatalf("cut to %d bytes: %v", n, err)
		}
		bad := bytes.Clone(good)
		bad[n] ^= 0x40
		if _, err := snapshot.DecodeTOC(bad); !errors.Is(err, snapshot.ErrDamaged) {
			t.Fatalf("byte %d flipped: %v", n, err)
		}
	}
}

// FuzzDecodeTOC checks that a table with a right checksum cannot make a reader
// panic or loop, whoever wrote it.
func FuzzDecodeTOC(f *testing.F) {
	toc, err := snapshot.NewTOC([]snapshot.Entry{
		{Path: "a/b", Type: snapshot.Hardlink, Link: "c"}, {Path: "c", Type: snapshot.Hardlink, Link: "a/b"},
		{Path: "d", Type: snapshot.Dir, Xattrs: map[string]string{"a": "1"}}, {Path: "e/f", Type: snapshot.File},
	})
	if err != nil {
		f.Fatal(err)
	}
	f.Add(toc.Encode())
	f.Fuzz(func(t *testing.T, data []byte) {
		toc, err := snapshot.DecodeTOC(snapshot.WithChecksum(data))
		if err != nil {
			return
		}
		v, err := snapshot.NewStackView([]snapshot.StackLayer{{TOC: toc}, {TOC: toc}})
		if err != nil {
			return
		}
		n := 0
		snapshot.Walk(v, "", func(e snapshot.Entry) error {
			if n++; n > 10_000 {
				return errors.New("enough")
			}
			return nil
		})
	})
}
