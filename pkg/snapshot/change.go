package snapshot

import (
	"bytes"
	"context"
	"errors"
	"io"
	"io/fs"
	"slices"
	"syscall"
)

// A Change is one entry of a layer to be written.
type Change struct {
	Entry
	// From and FromPath say where a File's content is.
	From     View
	FromPath string
}

// changesByLayer orders changes as a layer has them: as ComparePaths, but with
// the whiteouts of a directory before its other children, so that a program
// which applies one entry after the other never deletes what it has just made.
func compareChanges(a, b *Change) int {
	da, na := Split(a.Path)
	db, nb := Split(b.Path)
	if da == db {
		if wa, wb := a.Type == Whiteout, b.Type == Whiteout; wa != wb {
			if wa {
				return -1
			}
			return 1
		}
		return ComparePaths(na, nb)
	}
	// The siblings that contain a and b decide. A whiteout has nothing below
	// it, so that if one of the two is a sibling of the other's ancestor, it
	// comes first.
	if a.Type == Whiteout && below(b.Path, da) && !below(b.Path, a.Path) {
		return -1
	}
	if b.Type == Whiteout && below(a.Path, db) && !below(a.Path, b.Path) {
		return 1
	}
	return ComparePaths(a.Path, b.Path)
}

// complete turns changes into the full content of a layer: sorted, with every
// directory above a change exactly once, and with hard links between the
// changed names of one file. view is the file system with the changes made;
// it gives the parents' metadata.
func complete(changes []Change, view View) ([]Change, error) {
	have := make(map[string]bool, len(changes)/4)
	for i := range changes {
		if changes[i].Type == Dir {
			have[changes[i].Path] = true
		}
	}
	for i, n := 0, len(changes); i < n; i++ {
		for dir, _ := Split(changes[i].Path); dir != "" && !have[dir]; dir, _ = Split(dir) {
			e, err := view.Lstat(dir)
			if err != nil {
				return nil, err
			}
			have[dir] = true
			changes = append(changes, Change{Entry: e})
		}
	}
	slices.SortFunc(changes, func(a, b Change) int { return compareChanges(&a, &b) })
	linkNames(changes)
	return changes, nil
}

// linkNames makes hard links of the second and later names of a file.
func linkNames(changes []Change) {
	first := map[uint64]string{}
	for i := range changes {
		c := &changes[i]
		if c.Type != File || c.Inode == 0 {
			continue
		}
		name, ok := first[c.Inode]
		if !ok {
			first[c.Inode] = c.Path
			continue
		}
		c.Type, c.Link, c.Size = Hardlink, name, 0
		c.From, c.FromPath = nil, ""
	}
}

// unchanged reports whether the entry is what the lower view has at its path
// already. It decides as other builders do: a directory's time does not
// matter; a file is equal if metadata, size, the second of its time and then
// its content are. Times are compared in seconds, because that is all that a
// layer keeps: the answer must not depend on whether the lower layer is fresh
// or comes back from a registry.
func (c *Change) unchanged(ctx context.Context, lower View) (bool, error) {
	old, err := lower.Lstat(c.Path)
	if errors.Is(err, fs.ErrNotExist) || errors.Is(err, syscall.ENOTDIR) {
		return false, nil
	}
	if err != nil {
		return false, err
	}
	if !sameMeta(&c.Entry, &old) {
		return false, nil
	}
	switch {
	case c.Type == Dir:
		return true, nil
	case seconds(c.ModTime) != seconds(old.ModTime) || c.Size != old.Size:
		return false, nil
	case c.Type == Symlink:
		return c.Link == old.Link, nil
	case c.Type != File || c.Size == 0:
		return true, nil
	case c.HasDigest() && old.HasDigest():
		return c.Digest == old.Digest, nil
	}
	a, err := c.From.Open(ctx, c.FromPath)
	if err != nil {
		return false, err
	}
	defer a.Close()
	b, err := lower.Open(ctx, c.Path)
	if err != nil {
		return false, err
	}
	defer b.Close()
	return sameContent(a, b)
}

// seconds is ns in whole seconds, rounded down.
func seconds(ns int64) int64 {
	s := ns / 1e9
	if ns%1e9 < 0 {
		s--
	}
	return s
}

func sameContent(a, b io.Reader) (bool, error) {
	const size = 64 << 10
	x, y := make([]byte, size), make([]byte, size)
	for {
		n, errA := io.ReadFull(a, x)
		m, errB := io.ReadFull(b, y)
		if !bytes.Equal(x[:n], y[:m]) {
			return false, nil
		}
		endA := errA == io.EOF || errA == io.ErrUnexpectedEOF
		endB := errB == io.EOF || errB == io.ErrUnexpectedEOF
		switch {
		case endA && endB:
			return true, nil
		case errA != nil && !endA:
			return false, errA
		case errB != nil && !endB:
			return false, errB
		case endA != endB:
			return false, nil
		}
	}
}
