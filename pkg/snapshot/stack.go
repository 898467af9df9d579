package snapshot

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"slices"
	"sync"
	"syscall"
)

// layerSource answers for one layer of a stack, ignoring all others.
type layerSource interface {
	// lookup returns the entry of the layer at path, whiteouts included. A
	// path that the layer says nothing about gives fs.ErrNotExist. Hard links
	// are resolved; one that leads nowhere is returned as a Hardlink.
	lookup(path string) (Entry, error)
	// list returns the entries of the layer directly below path, whiteouts
	// included.
	list(path string) ([]Entry, error)
	open(ctx context.Context, path string) (io.ReadCloser, error)
}

// stackView merges layers as overlayfs does.
type stackView struct {
	layers []layerSource // lowest first
	mu     sync.Mutex
	dirs   map[string][]int // directory -> layers that show in it, topmost first
}

func newStackView(layers []layerSource) *stackView {
	all := make([]int, len(layers))
	for i := range all {
		all[i] = len(layers) - 1 - i
	}
	return &stackView{layers: layers, dirs: map[string][]int{"": all}}
}

// A StackLayer is one layer of a view made by NewStackView. It has a Tree, or
// a TOC.
type StackLayer struct {
	// Tree is the directory of the unpacked layer.
	Tree string
	// TOC is the layer's table of contents.
	TOC *TOC
	// Open returns the content of a file of the layer, for one that has only a
	// TOC. nil, if content is never asked for.
	Open func(ctx context.Context, path string) (io.ReadCloser, error)
}

// NewStackView returns the view that a stack of layers shows, lowest first.
func NewStackView(layers []StackLayer) (View, error) {
	src := make([]layerSource, 0, len(layers))
	for i, l := range layers {
		if l.TOC == nil {
			src = append(src, &treeSource{dir: l.Tree, layer: i})
			continue
		}
		toc, err := rebase(l.TOC, newStackView(src))
		if err != nil {
			return nil, err
		}
		src = append(src, newTOCSource(toc, i, l.Open))
	}
	return newStackView(src), nil
}

// rebase moves entries to where they come to lie when the layer is unpacked on
// top of lower: a directory that the layer passes through without carrying it
// may be a symlink there. Layers that carry all their parents are returned as
// they are.
func rebase(t *TOC, lower View) (*TOC, error) {
	moved := map[string]string{}
	for i := range t.n {
		if t.record(i)[7]&flagImplicit == 0 {
			continue
		}
		dir := t.path(i)
		to, err := Resolve(lower, place(moved, dir), true)
		if err != nil {
			return nil, err
		}
		if to != dir {
			moved[dir] = to
		}
	}
	if len(moved) == 0 {
		return t, nil
	}
	entries := make([]Entry, 0, t.n)
	for e := range t.All() {
		if _, ok := moved[e.Path]; ok {
			continue
		}
		e.Path = place(moved, e.Path)
		if e.Type == Hardlink {
			e.Link = place(moved, e.Link)
		}
		entries = append(entries, e)
	}
	return NewTOC(entries)
}

// place returns path with the longest of its directories that has moved
// replaced.
func place(moved map[string]string, path string) string {
	for dir, _ := Split(path); dir != ""; dir, _ = Split(dir) {
		if to, ok := moved[dir]; ok {
			return Join(to, path[len(dir)+1:])
		}
	}
	return path
}

// NewTreeView returns the view that a stack of trees shows, lowest first.
func NewTreeView(dirs []string) View {
	src := make([]layerSource, len(dirs))
	for i, d := range dirs {
		src[i] = &treeSource{dir: d, layer: i}
	}
	return newStackView(src)
}

func (v *stackView) Lstat(path string) (Entry, error) {
	if path == "" {
		return rootEntry(), nil
	}
	e, _, err := v.find(path)
	return e, err
}

// find returns the entry at path and the index of the layer it comes from.
func (v *stackView) find(path string) (Entry, int, error) {
	dir, _ := Split(path)
	layers, err := v.contributors(dir)
	if err != nil {
		return Entry{}, 0, err
	}
	return v.findIn(path, layers)
}

func (v *stackView) findIn(path string, layers []int) (Entry, int, error) {
	for n, i := range layers {
		e, err := v.layers[i].lookup(path)
		if errors.Is(err, fs.ErrNotExist) {
			continue
		}
		if err != nil {
			return Entry{}, 0, err
		}
		switch {
		case e.Type == Whiteout:
			return Entry{}, 0, notExist("lstat", path)
		case e.Type == Hardlink:
			return Entry{}, 0, danglingLink(e)
		case e.Implicit:
			// Its metadata comes from below, if there is a directory there.
			if below, j, err := v.findIn(path, layers[n+1:]); err == nil && below.Type == Dir {
				return below, j, nil
			}
			return e, i, nil
		}
		return e, i, nil
	}
	return Entry{}, 0, notExist("lstat", path)
}

// danglingLink is the error for a hard link to what its layer does not have.
// Apply refuses such layers.
func danglingLink(e Entry) error {
	return fmt.Errorf("%w: hard link /%s leads to /%s, which is not there", ErrDamaged, e.Path, e.Link)
}

// contributors returns the layers whose entries show in the directory at path.
func (v *stackView) contributors(path string) ([]int, error) {
	v.mu.Lock()
	known, ok := v.dirs[path]
	v.mu.Unlock()
	if ok {
		return known, nil
	}
	parent, _ := Split(path)
	above, err := v.contributors(parent)
	if err != nil {
		return nil, err
	}
	var out []int
	for _, i := range above {
		e, err := v.layers[i].lookup(path)
		if errors.Is(err, fs.ErrNotExist) {
			continue
		}
		if err != nil {
			return nil, err
		}
		if e.Type != Dir {
			if len(out) == 0 {
				if e.Type == Whiteout {
					return nil, notExist("lstat", path)
				}
				return nil, notDir("lstat", path)
			}
			break
		}
		out = append(out, i)
		if e.Opaque {
			break
		}
	}
	if len(out) == 0 {
		return nil, notExist("lstat", path)
	}
	v.mu.Lock()
	v.dirs[path] = out
	v.mu.Unlock()
	return out, nil
}

func (v *stackView) ReadDir(path string) ([]Entry, error) {
	layers, err := v.contributors(path)
	if err != nil {
		return nil, err
	}
	seen := map[string]bool{}
	var out []Entry
	for n, i := range layers {
		entries, err := v.layers[i].list(path)
		if err != nil {
			return nil, err
		}
		for _, e := range entries {
			name := e.Name()
			if seen[name] {
				continue
			}
			seen[name] = true
			if e.Type == Whiteout {
				continue
			}
			if e.Type == Hardlink {
				return nil, danglingLink(e)
			}
			if e.Implicit {
				if e, _, err = v.findIn(e.Path, layers[n:]); err != nil {
					return nil, err
				}
			}
			out = append(out, e)
		}
	}
	slices.SortFunc(out, func(a, b Entry) int { return ComparePaths(a.Path, b.Path) })
	return out, nil
}

func (v *stackView) Open(ctx context.Context, path string) (io.ReadCloser, error) {
	if path == "" {
		return nil, &fs.PathError{Op: "open", Path: "/", Err: syscall.EISDIR}
	}
	_, i, err := v.find(path)
	if err != nil {
		return nil, err
	}
	return v.layers[i].open(ctx, path)
}

// tocSource answers for a layer from its table of contents.
type tocSource struct {
	toc       *TOC
	layer     int
	openLayer func(ctx context.Context, path string) (io.ReadCloser, error)
	linked    func() map[int]bool // the entries that have further names
}

func newTOCSource(t *TOC, layer int, open func(context.Context, string) (io.ReadCloser, error)) *tocSource {
	s := &tocSource{toc: t, layer: layer, openLayer: open}
	s.linked = sync.OnceValue(func() map[int]bool {
		m := map[int]bool{}
		for i := range t.n {
			if Type(t.record(i)[6]) == Hardlink {
				m[s.target(i)] = true
			}
		}
		return m
	})
	return s
}

func (s *tocSource) lookup(path string) (Entry, error) {
	i, ok := s.toc.Find(path)
	if !ok {
		return Entry{}, fs.ErrNotExist
	}
	return s.resolve(i), nil
}

// target returns the entry that entry i is another name of: itself, if it is
// no hard link, and a hard link, if the chain leads nowhere.
func (s *tocSource) target(i int) int {
	for range maxLinks {
		if Type(s.toc.record(i)[6]) != Hardlink {
			break
		}
		j, ok := s.toc.Find(s.toc.At(i).Link)
		if !ok {
			break
		}
		i = j
	}
	return i
}

// resolve returns entry i, seen through a hard link if it is one.
func (s *tocSource) resolve(i int) Entry {
	j := s.target(i)
	e := s.toc.At(j)
	e.Path = s.toc.path(i)
	if e.Type == File && s.linked()[j] {
		e.Inode = uint64(s.layer+1)<<32 | uint64(j)
	}
	return e
}

func (s *tocSource) list(path string) ([]Entry, error) {
	i := -1
	if path != "" {
		var ok bool
		if i, ok = s.toc.Find(path); !ok {
			return nil, fs.ErrNotExist
		}
	}
	var out []Entry
	for j := range s.toc.children(i) {
		out = append(out, s.resolve(j))
	}
	return out, nil
}

func (s *tocSource) open(ctx context.Context, path string) (io.ReadCloser, error) {
	if s.openLayer == nil {
		return nil, &fs.PathError{Op: "open", Path: "/" + path, Err: errors.ErrUnsupported}
	}
	return s.openLayer(ctx, path)
}
