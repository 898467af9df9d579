package snapshot

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"strings"
	"syscall"
)

// A View is a read-only file system: what a stack of layers shows, a build
// context, an unpacked archive. Paths have the form of Entry.Path. Methods are
// safe for concurrent use.
type View interface {
	// Lstat returns the entry at path without following a symlink in the last
	// element. Elements before it must be directories: a missing one gives an
	// error that wraps fs.ErrNotExist, another kind one that wraps
	// syscall.ENOTDIR. Lstat("") is the root.
	Lstat(path string) (Entry, error)
	// ReadDir returns what is directly below the directory at path, sorted by
	// name.
	ReadDir(path string) ([]Entry, error)
	// Open returns the content of the File at path.
	Open(ctx context.Context, path string) (io.ReadCloser, error)
}

// maxLinks is how many symlinks Resolve follows, as many as Linux does.
const maxLinks = 40

// Resolve follows the symlinks in path as a process would that has the view as
// its root: absolute targets start at the root and ".." never leaves it. What
// does not exist is kept as it is written, so that the result also names files
// still to be made. The last element is followed only if followLast is set.
func Resolve(v View, path string, followLast bool) (string, error) {
	todo := strings.Split(path, "/")
	done, links, missing := "", 0, false
	for len(todo) > 0 {
		name := todo[0]
		todo = todo[1:]
		switch name {
		case "", ".":
			continue
		case "..":
			done, _ = Split(done)
			missing = false
			continue
		}
		next := Join(done, name)
		if missing || (!followLast && lastElement(todo)) {
			done = next
			continue
		}
		e, err := v.Lstat(next)
		if errors.Is(err, fs.ErrNotExist) || errors.Is(err, syscall.ENOTDIR) {
			missing = true
			done = next
			continue
		}
		if err != nil {
			return "", err
		}
		if e.Type != Symlink {
			done = next
			continue
		}
		if links++; links > maxLinks {
			return "", &fs.PathError{Op: "resolve", Path: "/" + Clean(path), Err: syscall.ELOOP}
		}
		if strings.HasPrefix(e.Link, "/") {
			done = ""
		}
		todo = append(strings.Split(e.Link, "/"), todo...)
	}
	return done, nil
}

// lastElement reports whether nothing but empty elements is left to do.
func lastElement(todo []string) bool {
	for _, s := range todo {
		if s != "" && s != "." {
			return false
		}
	}
	return true
}

// Stat is Lstat with all symlinks in path followed inside the view.
func Stat(v View, path string) (Entry, error) {
	p, err := Resolve(v, path, true)
	if err != nil {
		return Entry{}, err
	}
	return v.Lstat(p)
}

// ReadFile returns the content of the file that path leads to, symlinks
// followed inside the view. Content beyond limit bytes is an error.
func ReadFile(ctx context.Context, v View, path string, limit int64) ([]byte, error) {
	p, err := Resolve(v, path, true)
	if err != nil {
		return nil, err
	}
	e, err := v.Lstat(p)
	if err != nil {
		return nil, err
	}
	if e.Type != File {
		return nil, &fs.PathError{Op: "read", Path: "/" + p, Err: fmt.Errorf("is a %s", e.Type)}
	}
	r, err := v.Open(ctx, p)
	if err != nil {
		return nil, err
	}
	defer r.Close()
	b, err := io.ReadAll(io.LimitReader(r, limit+1))
	if err == nil && int64(len(b)) > limit {
		err = &fs.PathError{Op: "read", Path: "/" + p, Err: fmt.Errorf("larger than %d bytes", limit)}
	}
	return b, err
}

// Walk calls fn for the entry at root and for everything below it, in the
// order of ComparePaths. If fn returns fs.SkipDir for a directory, what is
// below it is left out.
func Walk(v View, root string, fn func(Entry) error) error {
	e, err := v.Lstat(root)
	if err != nil {
		return err
	}
	return walk(v, e, fn)
}

func walk(v View, e Entry, fn func(Entry) error) error {
	err := fn(e)
	if e.Type != Dir {
		return err
	}
	if err == fs.SkipDir {
		return nil
	}
	if err != nil {
		return err
	}
	children, err := v.ReadDir(e.Path)
	if err != nil {
		return err
	}
	for _, c := range children {
		if err := walk(v, c, fn); err != nil {
			return err
		}
	}
	return nil
}

// Empty is the View of no layers at all: an empty root directory.
var Empty View = emptyView{}

type emptyView struct{}

func (emptyView) Lstat(path string) (Entry, error) {
	if path == "" {
		return rootEntry(), nil
	}
	return Entry{}, notExist("lstat", path)
}

func (v emptyView) ReadDir(path string) ([]Entry, error) {
	_, err := v.Lstat(path)
	return nil, err
}

func (emptyView) Open(_ context.Context, path string) (io.ReadCloser, error) {
	return nil, notExist("open", path)
}

// rootEntry is the root directory of every image: layers do not carry it.
func rootEntry() Entry { return Entry{Type: Dir, Mode: 0o755} }

func notDir(op, path string) error {
	return &fs.PathError{Op: op, Path: "/" + path, Err: syscall.ENOTDIR}
}
