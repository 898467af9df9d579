package snapshot_test

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"strings"
	"testing"

	"github.com/ondol-dev/ondol/internal/imagetest"
	"github.com/ondol-dev/ondol/pkg/snapshot"
)

// describe writes one line per path of a view, with everything that an image
// records about it, so that file systems can be compared as text.
func describe(t *testing.T, v snapshot.View) string {
	t.Helper()
	var b strings.Builder
	links := map[uint64]string{}
	err := snapshot.Walk(v, "", func(e snapshot.Entry) error {
		if e.Path == "" {
			return nil
		}
		fmt.Fprintf(&b, "%s %s %04o %d:%d", e.Path, e.Type, e.Mode, e.UID, e.GID)
		switch e.Type {
		case snapshot.File:
			content, err := snapshot.ReadFile(t.Context(), v, e.Path, 1<<20)
			if err != nil {
				return err
			}
			fmt.Fprintf(&b, " %d %q", e.ModTime/1e9, content)
			if c := e.Xattrs[snapshot.Capability]; c != "" {
				fmt.Fprintf(&b, " cap=%x", c)
			}
			if e.Inode != 0 {
				if first, ok := links[e.Inode]; ok {
					fmt.Fprintf(&b, " = %s", first)
				} else {
					links[e.Inode] = e.Path
				}
			}
		case snapshot.Symlink:
			fmt.Fprintf(&b, " -> %s", e.Link)
		case snapshot.Char, snapshot.Block:
			fmt.Fprintf(&b, " %d,%d", e.Major, e.Minor)
		}
		b.WriteByte('\n')
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	return b.String()
}

// apply unpacks a tar into a fresh directory.
func apply(t *testing.T, layer []byte, lower snapshot.View) (string, *snapshot.Applied) {
	t.Helper()
	dir := t.TempDir()
	a, err := snapshot.Apply(t.Context(), bytes.NewReader(layer), dir, snapshot.ApplyOptions{Lower: lower})
	if err != nil {
		t.Fatal(err)
	}
	return dir, a
}

// stack unpacks layers on top of each other and returns their trees and
// tables.
func stack(t *testing.T, layers ...[]byte) (dirs []string, tocs []*snapshot.TOC) {
	t.Helper()
	for _, l := range layers {
		dir, a := apply(t, l, snapshot.NewTreeView(dirs))
		dirs = append(dirs, dir)
		tocs = append(tocs, a.TOC)
	}
	return dirs, tocs
}

// tables makes stack layers of tables whose content is in the trees.
func tables(dirs []string, tocs []*snapshot.TOC) []snapshot.StackLayer {
	var out []snapshot.StackLayer
	for i, toc := range tocs {
		out = append(out, snapshot.StackLayer{TOC: toc, Open: func(ctx context.Context, path string) (io.ReadCloser, error) {
			return snapshot.NewTreeView(dirs[i:i+1]).Open(ctx, path)
		}})
	}
	return out
}

// writeLayer is WriteLayer into memory.
func writeLayer(t *testing.T, changes []snapshot.Change) ([]byte, *snapshot.TOC) {
	t.Helper()
	var b bytes.Buffer
	toc, err := snapshot.WriteLayer(t.Context(), &b, changes)
	if err != nil {
		t.Fatal(err)
	}
	return b.Bytes(), toc
}

func diff(t *testing.T, what, got, want string) {
	t.Helper()
	if got == want {
		return
	}
	g, w := strings.Split(got, "\n"), strings.Split(want, "\n")
	in := func(list []string, s string) bool {
		for _, x := range list {
			if x == s {
				return true
			}
		}
		return false
	}
	var b strings.Builder
	for _, l := range w {
		if !in(g, l) {
			fmt.Fprintf(&b, "- %s\n", l)
		}
	}
	for _, l := range g {
		if !in(w, l) {
			fmt.Fprintf(&b, "+ %s\n", l)
		}
	}
	t.Errorf("%s (-want +got):\n%s", what, b.String())
}

var (
	file    = imagetest.File
	dir     = imagetest.Dir
	symlink = imagetest.Symlink
	link    = imagetest.Link
)
