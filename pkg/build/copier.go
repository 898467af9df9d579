package build

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"strings"
	"syscall"

	mode "github.com/tonistiigi/dchapes-mode"

	"github.com/ondol-dev/ondol/pkg/snapshot"
)

// copier copies files from views into a draft with the rules of BuildKit's
// COPY.
type copier struct {
	draft *snapshot.Draft
	// owner is who gets everything; nil leaves files to whom they belong.
	owner *owner
	// mode is what everything gets, and also directories that are made on the
	// way; symbolic changes the modes that files have. At most one is set.
	mode     *uint32
	symbolic *mode.Set
	// now is the time of directories that no source has.
	now int64

	inodes map[uint64]uint64 // of the item that is being copied, in the draft
}

// copy copies what is selected to dest, an absolute path of the image of which
// a slash at the end says that it is a directory.
func (c *copier) copy(ctx context.Context, sel *selection, dest string) error {
	for _, it := range sel.items {
		if err := c.copyItem(ctx, sel.view, it, dest); err != nil {
			return err
		}
	}
	return nil
}

func (c *copier) copyItem(ctx context.Context, v snapshot.View, it selected, dest string) error {
	c.inodes = map[uint64]uint64{} // hard links are kept within one item
	// What must be a directory: dest itself if it is written as one, else
	// what it lies in.
	dir := dest[:strings.LastIndexByte(dest, '/')+1]
	if strings.HasSuffix(dest, "/.") {
		dir = dest
	}
	if err := c.ensureDir(dir); err != nil {
		return err
	}
	target, err := snapshot.Resolve(c.draft, dest, true)
	if err != nil {
		return err
	}
	there, exists, err := c.lstat(target)
	if err != nil {
		return err
	}
	isDir := it.entry.Type == snapshot.Dir
	if !isDir && exists && there.Type == snapshot.Dir {
		target = snapshot.Join(target, it.name)
	}
	parent, _ := snapshot.Split(target)
	if isDir && !exists {
		parent = target
	}
	if err := makeDirs(c.draft, parent, c.dirMode(), c.dirOwner(), c.now); err != nil {
		return err
	}
	return it.walk(ctx, v, func(p picked) error {
		to := target
		if p.rel != "" {
			to = snapshot.Join(target, p.rel)
		}
		if p.Type == snapshot.Dir {
			return c.putDir(p, to)
		}
		return c.putFile(v, p.Entry, to)
	})
}

// ensureDir makes a directory of the image with those above it.
func (c *copier) ensureDir(dir string) error {
	path, err := snapshot.Resolve(c.draft, dir, true)
	if err != nil {
		return err
	}
	return makeDirs(c.draft, path, c.dirMode(), c.dirOwner(), c.now)
}

// dirMode is the mode of directories that are made on the way.
func (c *copier) dirMode() uint32 {
	if c.mode != nil {
		return *c.mode
	}
	return 0o755
}

func (c *copier) dirOwner() owner {
	if c.owner != nil {
		return *c.owner
	}
	return owner{}
}

// lstat is Draft.Lstat with absence as a result instead of an error.
func (c *copier) lstat(path string) (snapshot.Entry, bool, error) { return lstat(c.draft, path) }

func lstat(v snapshot.View, path string) (snapshot.Entry, bool, error) {
	e, err := v.Lstat(path)
	if errors.Is(err, fs.ErrNotExist) || errors.Is(err, syscall.ENOTDIR) {
		return e, false, nil
	}
	return e, err == nil, err
}

// makeDirs makes the directory at path, which is free of symlinks, and those
// above it as far as they are missing.
func makeDirs(d *snapshot.Draft, path string, mode uint32, o owner, now int64) error {
	e, exists, err := lstat(d, path)
	if err != nil {
		return err
	}
	if exists {
		if e.Type != snapshot.Dir {
			return &fs.PathError{Op: "mkdir", Path: "/" + path, Err: syscall.ENOTDIR}
		}
		return nil
	}
	parent, _ := snapshot.Split(path)
	if err := makeDirs(d, parent, mode, o, now); err != nil {
		return err
	}
	return d.Put(snapshot.Entry{Path: path, Type: snapshot.Dir, Mode: mode, UID: o.uid, GID: o.gid, ModTime: now}, nil, "")
}

// putFile copies anything but a directory.
func (c *copier) putFile(v snapshot.View, e snapshot.Entry, target string) error {
	old, exists, err := c.lstat(target)
	if err != nil {
		return err
	}
	if exists && old.Type == snapshot.Dir {
		return fmt.Errorf("cannot replace to directory /%s with file", target)
	}
	n := c.placed(e, target)
	if e.Inode != 0 {
		n.Inode = c.inode(e.Inode)
	}
	return c.draft.Put(n, v, e.Path)
}

// inode returns the number by which the names of one file in this item know
// each other in the draft.
func (c *copier) inode(source uint64) uint64 {
	id, ok := c.inodes[source]
	if !ok {
		id = c.draft.NewInode()
		c.inodes[source] = id
	}
	return id
}

// putDir copies a directory without its content. One that exists takes over
// the metadata of the source if it lies within the tree that is copied, but
// only its mode if it is just around something; and if it is the destination
// itself, it keeps its own, but for its time.
func (c *copier) putDir(p picked, target string) error {
	old, exists, err := c.lstat(target)
	if err != nil {
		return err
	}
	if exists && old.Type != snapshot.Dir {
		return fmt.Errorf("cannot copy to non-directory: /%s", target)
	}
	if target == "" {
		return nil // the root belongs to no layer
	}
	n := c.placed(p.Entry, target)
	switch {
	case exists && p.rel == "":
		old.ModTime = p.ModTime
		n = old
	case exists && p.around:
		old.Mode = p.Mode
		n = old
	}
	return c.draft.Put(n, nil, "")
}

// placed is the entry that a copy of e at target has.
func (c *copier) placed(e snapshot.Entry, target string) snapshot.Entry {
	e.Path, e.Inode = target, 0
	if c.owner != nil {
		e.UID, e.GID = c.owner.uid, c.owner.gid
	}
	if e.Type == snapshot.Symlink {
		return e
	}
	switch {
	case c.symbolic != nil:
		e.Mode = applySymbolic(*c.symbolic, e)
	case c.mode != nil:
		e.Mode = *c.mode
	}
	return e
}

// applySymbolic changes a mode as chmod does.
func applySymbolic(set mode.Set, e snapshot.Entry) uint32 {
	m := os.FileMode(e.Mode & 0o777)
	for bit, flag := range map[uint32]os.FileMode{0o4000: os.ModeSetuid, 0o2000: os.ModeSetgid, 0o1000: os.ModeSticky} {
		if e.Mode&bit != 0 {
			m |= flag
		}
	}
	if e.Type == snapshot.Dir {
		m |= os.ModeDir
	}
	m = set.Apply(m)
	out := uint32(m.Perm())
	for bit, flag := range map[uint32]os.FileMode{0o4000: os.ModeSetuid, 0o2000: os.ModeSetgid, 0o1000: os.ModeSticky} {
		if m&flag != 0 {
			out |= bit
		}
	}
	return out
}
