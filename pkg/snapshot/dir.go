package snapshot

import (
	"context"
	"errors"
	"io"
	"io/fs"
	"os"
	"slices"
	"strings"
	"syscall"
)

// Verdict is what a filter says of a path.
type Verdict int

const (
	// Keep: the path is there.
	Keep Verdict = iota
	// Skip: the path is absent, and so is everything below it.
	Skip
	// Descend: the directory is there only if something below it is kept.
	Descend
)

// A Filter decides which paths of a directory are there. It is asked about a
// path only after the directories above it, of which none was a Skip.
type Filter func(path string, isDir bool) (Verdict, error)

// NewDirView returns the view of the plain directory dir, which must not
// change while it is in use. Sockets are left out, since no layer can carry
// them, and so is what filter, if not nil, decides against.
func NewDirView(dir string, filter Filter) View {
	return &dirView{dir: dir, filter: filter}
}

type dirView struct {
	dir    string
	filter Filter
}

func (v *dirView) Lstat(path string) (Entry, error) {
	if path == "" {
		e, err := lstatEntry(v.dir, "")
		if err == nil && e.Type != Dir {
			err = notDir("lstat", "")
		}
		return e, err
	}
	if err := v.checkParents(path); err != nil {
		return Entry{}, err
	}
	e, err := lstatEntry(v.dir, path)
	if err != nil {
		return Entry{}, err
	}
	ok, err := v.kept(&e)
	if err != nil {
		return Entry{}, err
	}
	if !ok {
		return Entry{}, notExist("lstat", path)
	}
	return e, nil
}

// checkParents makes sure that the elements before the last are directories
// that the filter does not skip.
func (v *dirView) checkParents(path string) error {
	for i := range len(path) {
		if path[i] != '/' {
			continue
		}
		fi, err := os.Lstat(v.dir + "/" + path[:i])
		if err != nil {
			return &fs.PathError{Op: "lstat", Path: "/" + path[:i], Err: errors.Unwrap(err)}
		}
		if !fi.IsDir() {
			return notDir("lstat", path[:i])
		}
		if v.filter == nil {
			continue
		}
		verdict, err := v.filter(path[:i], true)
		if err != nil {
			return err
		}
		if verdict == Skip {
			return notExist("lstat", path[:i])
		}
	}
	return nil
}

func (v *dirView) kept(e *Entry) (bool, error) {
	if e.Type == socket {
		return false, nil
	}
	if v.filter == nil {
		return true, nil
	}
	verdict, err := v.filter(e.Path, e.Type == Dir)
	if err != nil || verdict != Descend {
		return verdict == Keep, err
	}
	if e.Type != Dir {
		return false, nil
	}
	below, err := v.ReadDir(e.Path)
	return len(below) > 0, err
}

func (v *dirView) ReadDir(path string) ([]Entry, error) {
	all, err := readDirEntries(v.dir, path)
	if err != nil || v.filter == nil {
		return all, err
	}
	out := all[:0]
	for i := range all {
		ok, err := v.kept(&all[i])
		if err != nil {
			return nil, err
		}
		if ok {
			out = append(out, all[i])
		}
	}
	return out, nil
}

func (v *dirView) Open(_ context.Context, path string) (io.ReadCloser, error) {
	return openNoFollow(v.dir, path)
}

// NewMemView returns a view that holds the given files, by path, below an
// empty root. It is for content that comes from the Dockerfile itself.
func NewMemView(files map[string]MemFile) View { return memView(files) }

// MemFile is one file of a view made by NewMemView.
type MemFile struct {
	Content string
	Mode    uint32
	ModTime int64 // in ns
}

type memView map[string]MemFile

func (v memView) Lstat(path string) (Entry, error) {
	if path == "" {
		return rootEntry(), nil
	}
	f, ok := v[path]
	if !ok {
		return Entry{}, notExist("lstat", path)
	}
	return Entry{Path: path, Type: File, Mode: f.Mode, Size: int64(len(f.Content)), ModTime: f.ModTime}, nil
}

func (v memView) ReadDir(path string) ([]Entry, error) {
	if path != "" {
		return nil, &fs.PathError{Op: "readdir", Path: "/" + path, Err: syscall.ENOTDIR}
	}
	var out []Entry
	for p := range v {
		e, err := v.Lstat(p)
		if err != nil {
			return nil, err
		}
		out = append(out, e)
	}
	slices.SortFunc(out, func(a, b Entry) int { return ComparePaths(a.Path, b.Path) })
	return out, nil
}

func (v memView) Open(_ context.Context, path string) (io.ReadCloser, error) {
	f, ok := v[path]
	if !ok {
		return nil, notExist("open", path)
	}
	return io.NopCloser(strings.NewReader(f.Content)), nil
}
