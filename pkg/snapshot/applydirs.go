package snapshot

import (
	"container/list"
	"errors"
	"fmt"
	"io/fs"
	"strings"
	"sync/atomic"
	"syscall"

	"golang.org/x/sys/unix"
)

// parent returns the open directory that path leads to, for making files in
// it. What the layer has not brought is taken from the layers below, or made.
func (a *applier) parent(path string, links int) (*dirHandle, error) {
	if h := a.dirs.get(path); h != nil {
		return h, nil
	}
	dir, name := Split(path)
	up, err := a.parent(dir, links)
	if err != nil {
		return nil, err
	}
	defer up.release()
	real := Join(up.path, name)
	if err := a.makers.settle(real); err != nil {
		return nil, err
	}
	fd, err := unix.Openat(up.fd, name, unix.O_RDONLY|unix.O_DIRECTORY|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0)
	switch err {
	case nil:
		return a.dirs.put(path, real, fd), nil
	case unix.ENOENT:
		return a.fromLower(up, path, name, links)
	case unix.ENOTDIR, unix.ELOOP:
		return a.throughLink(up, path, name, links)
	}
	return nil, err
}

// fromLower makes the directory up/name, which this layer's tar does not
// carry, as the layers below have it.
func (a *applier) fromLower(up *dirHandle, path, name string, links int) (*dirHandle, error) {
	a.dependent = true
	real := Join(up.path, name)
	e, err := a.lower.Lstat(real)
	switch {
	case err == nil && e.Type == Symlink:
		return a.follow(up, path, e.Link, links)
	case err == nil && e.Type == Dir:
		e.Opaque, e.Implicit = false, false
	case err == nil, errors.Is(err, fs.ErrNotExist), errors.Is(err, syscall.ENOTDIR):
		e = Entry{Type: Dir, Mode: 0o755}
	default:
		return nil, err
	}
	e.Path = real
	a.meta[real] = e
	if err := unix.Mkdirat(up.fd, name, 0o700); err != nil {
		return nil, err
	}
	fd, err := unix.Openat(up.fd, name, unix.O_RDONLY|unix.O_DIRECTORY|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, err
	}
	return a.dirs.put(path, real, fd), nil
}

// throughLink handles a parent that this layer has made as something other
// than a directory.
func (a *applier) throughLink(up *dirHandle, path, name string, links int) (*dirHandle, error) {
	var st unix.Stat_t
	if err := unix.Fstatat(up.fd, name, &st, unix.AT_SYMLINK_NOFOLLOW); err != nil {
		return nil, err
	}
	switch {
	case st.Mode&unix.S_IFMT == unix.S_IFLNK:
		buf := make([]byte, unix.PathMax)
		n, err := unix.Readlinkat(up.fd, name, buf)
		if err != nil {
			return nil, err
		}
		return a.follow(up, path, string(buf[:n]), links)
	case st.Mode&unix.S_IFMT == unix.S_IFCHR && st.Rdev == 0:
		// Deleted in this layer and filled anew without saying so.
		a.dependent = true
		real := Join(up.path, name)
		a.meta[real] = Entry{Path: real, Type: Dir, Mode: 0o755}
		if err := a.replaceWithDir(up, name); err != nil {
			return nil, err
		}
		return a.parent(path, links)
	}
	return nil, fmt.Errorf("%q is not a directory", path)
}

// follow returns the directory that a symlink in up leads to.
func (a *applier) follow(up *dirHandle, path, target string, links int) (*dirHandle, error) {
	if links >= maxLinks {
		return nil, fmt.Errorf("%q: too many symlinks", path)
	}
	if !strings.HasPrefix(target, "/") {
		target = up.path + "/" + target
	}
	h, err := a.parent(Clean(target), links+1)
	if err != nil {
		return nil, err
	}
	a.dirs.alias(path, h)
	return h, nil
}

// A dirHandle is an open directory of the tree. Whoever gets one releases it.
type dirHandle struct {
	path string // in the tree, free of symlinks
	fd   int
	refs atomic.Int32
}

func (h *dirHandle) release() {
	if h.refs.Add(-1) == 0 {
		unix.Close(h.fd)
	}
}

// openDirs bounds the number of directories that are open at once.
const openDirs = 256

// dirCache holds the directories used last by the names under which the tar
// spells them. It is used by one goroutine; only releases come from others.
type dirCache struct {
	byName map[string]*list.Element
	order  list.List // of cachedDir, most recently used first
}

type cachedDir struct {
	name   string
	handle *dirHandle
}

func newDirCache(root int) *dirCache {
	c := &dirCache{byName: map[string]*list.Element{}}
	c.put("", "", root).release()
	return c
}

// get returns the directory with a reference for the caller, or nil.
func (c *dirCache) get(name string) *dirHandle {
	el, ok := c.byName[name]
	if !ok {
		return nil
	}
	c.order.MoveToFront(el)
	h := el.Value.(cachedDir).handle
	h.refs.Add(1)
	return h
}

// put takes over fd and returns its handle with a reference for the caller.
func (c *dirCache) put(name, path string, fd int) *dirHandle {
	h := &dirHandle{path: path, fd: fd}
	h.refs.Store(1)
	c.alias(name, h)
	return h
}

// alias makes h known under one more name.
func (c *dirCache) alias(name string, h *dirHandle) {
	h.refs.Add(1)
	c.byName[name] = c.order.PushFront(cachedDir{name, h})
	for c.order.Len() > openDirs {
		last := c.order.Back()
		if last.Value.(cachedDir).name == "" {
			c.order.MoveToFront(last) // the root stays
			continue
		}
		c.drop(last)
	}
}

// forget drops what is known of the real directory path and all below it.
func (c *dirCache) forget(path string) {
	for el := c.order.Front(); el != nil; {
		next := el.Next()
		if p := el.Value.(cachedDir).handle.path; p == path || below(p, path) {
			c.drop(el)
		}
		el = next
	}
}

func (c *dirCache) drop(el *list.Element) {
	d := c.order.Remove(el).(cachedDir)
	delete(c.byName, d.name)
	d.handle.release()
}

func (c *dirCache) close() {
	for c.order.Len() > 0 {
		c.drop(c.order.Front())
	}
}
