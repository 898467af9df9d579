package snapshot

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"syscall"
)

// ScanUpper returns the layer that an overlay mount's upper directory amounts
// to on top of lower. The cost follows the change, never the image. The upper
// directory must not change until the layer has been written.
//
// A file that was copied up but is equal to the lower one is left out, as is a
// deletion of what lower does not have; a directory that was removed and made
// anew is compared with the old one. So the result is that of a comparison of
// the two file systems, whatever way led from one to the other.
func ScanUpper(ctx context.Context, upper string, lower View) ([]Change, error) {
	s := &upperScan{tree: &treeSource{dir: upper}, from: &dirView{dir: upper}, lower: lower}
	if err := s.dir(ctx, "", true); err != nil {
		return nil, fmt.Errorf("scan changes: %w", err)
	}
	return complete(s.changes, s.from)
}

type upperScan struct {
	tree    *treeSource
	from    View
	lower   View
	changes []Change
}

// dir adds the changes below the directory at path. shows says whether lower
// has a directory there.
func (s *upperScan) dir(ctx context.Context, path string, shows bool) error {
	if ctx.Err() != nil {
		return context.Cause(ctx)
	}
	entries, err := s.tree.list(path)
	if err != nil {
		return err
	}
	for _, e := range entries {
		if err := s.entry(ctx, e, shows); err != nil {
			return err
		}
	}
	return nil
}

func (s *upperScan) entry(ctx context.Context, e Entry, shows bool) error {
	if e.Type == Whiteout {
		if shows {
			return s.whiteout(e.Path)
		}
		return nil
	}
	opaque := e.Opaque
	e.Opaque = false
	c := Change{Entry: e, From: s.from, FromPath: e.Path}
	same := false
	if shows {
		var err error
		if same, err = c.unchanged(ctx, s.lower); err != nil {
			return err
		}
	}
	if !same {
		s.changes = append(s.changes, c)
	}
	if e.Type != Dir {
		return nil
	}
	below, err := s.lowerIsDir(e.Path, shows)
	if err != nil {
		return err
	}
	if opaque && below {
		if err := s.hidden(e.Path); err != nil {
			return err
		}
	}
	return s.dir(ctx, e.Path, below)
}

func (s *upperScan) whiteout(path string) error {
	_, err := s.lower.Lstat(path)
	if errors.Is(err, fs.ErrNotExist) || errors.Is(err, syscall.ENOTDIR) {
		return nil
	}
	if err == nil {
		s.changes = append(s.changes, Change{Entry: Entry{Path: path, Type: Whiteout}})
	}
	return err
}

func (s *upperScan) lowerIsDir(path string, shows bool) (bool, error) {
	if !shows {
		return false, nil
	}
	e, err := s.lower.Lstat(path)
	if errors.Is(err, fs.ErrNotExist) || errors.Is(err, syscall.ENOTDIR) {
		return false, nil
	}
	return e.Type == Dir, err
}

// hidden adds whiteouts for what lower has directly below an opaque directory
// and the upper directory has nothing for.
func (s *upperScan) hidden(path string) error {
	old, err := s.lower.ReadDir(path)
	if err != nil {
		return err
	}
	for _, e := range old {
		_, err := s.tree.lookup(e.Path)
		if err == nil {
			continue
		}
		if !errors.Is(err, fs.ErrNotExist) {
			return err
		}
		s.changes = append(s.changes, Change{Entry: Entry{Path: e.Path, Type: Whiteout}})
	}
	return nil
}
