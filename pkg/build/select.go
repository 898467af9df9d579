package build

import (
	"context"
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"path/filepath"
	"runtime"
	"strings"
	"sync"
	"syscall"

	"github.com/moby/patternmatcher"
	"golang.org/x/sync/errgroup"

	"github.com/ondol-dev/ondol/pkg/snapshot"
)

// selection is what the sources of a COPY or ADD amount to.
type selection struct {
	view  snapshot.View
	items []selected
}

// selected is one file or directory that a source leads to.
type selected struct {
	name  string // the last element of what the source names, before symlinks are followed
	entry snapshot.Entry
	only  pathFilter
}

// pathFilter says what of a directory is meant, by patterns for paths relative
// to it. The zero value is everything.
type pathFilter struct {
	include *patternmatcher.PatternMatcher // nil is all
	exclude *patternmatcher.PatternMatcher // nil is nothing
}

// picked is an entry that is to be copied.
type picked struct {
	snapshot.Entry
	rel string // path within the item
	// around is set for a directory that is not meant itself: something in it
	// is.
	around bool
}

// walk calls fn for everything of an item that its filter lets through,
// directories before what is in them.
func (it *selected) walk(ctx context.Context, v snapshot.View, fn func(picked) error) error {
	w := &itemWalk{ctx: ctx, view: v, only: it.only, fn: fn}
	return w.entry(it.entry, "", true, false, matchState{})
}

type itemWalk struct {
	ctx  context.Context // lives as long as walk
	view snapshot.View
	only pathFilter
	fn   func(picked) error
	open []picked // directories that have not been given to fn yet
}

// matchState is what matching has found out about a directory.
type matchState struct{ include, exclude patternmatcher.MatchInfo }

// child matches a path below a directory.
func (f *pathFilter) child(rel string, above matchState) (included, excluded bool, st matchState, err error) {
	included = true
	if f.include != nil {
		if included, st.include, err = f.include.MatchesUsingParentResults(rel, above.include); err != nil {
			return
		}
	}
	if f.exclude != nil {
		excluded, st.exclude, err = f.exclude.MatchesUsingParentResults(rel, above.exclude)
	}
	return included && !excluded, excluded, st, err
}

func (w *itemWalk) entry(e snapshot.Entry, rel string, included, excluded bool, st matchState) error {
	if w.ctx.Err() != nil {
		return context.Cause(w.ctx)
	}
	p := picked{Entry: e, rel: rel, around: !included}
	if e.Type != snapshot.Dir {
		if !included {
			return nil
		}
		return w.give(p)
	}
	if included {
		if err := w.give(p); err != nil {
			return err
		}
	}
	if excluded && !w.only.exclude.Exclusions() {
		return nil
	}
	depth := len(w.open)
	if !included {
		w.open = append(w.open, p)
	}
	children, err := w.view.ReadDir(e.Path)
	if err != nil {
		return err
	}
	for _, c := range children {
		childRel := snapshot.Join(rel, c.Name())
		inc, exc, below, err := w.only.child(childRel, st)
		if err == nil {
			err = w.entry(c, childRel, inc, exc, below)
		}
		if err != nil {
			return err
		}
	}
	w.open = w.open[:min(depth, len(w.open))]
	return nil
}

// give gives fn an entry, after the directories around it.
func (w *itemWalk) give(p picked) error {
	for _, d := range w.open {
		if err := w.fn(d); err != nil {
			return err
		}
	}
	w.open = w.open[:0]
	return w.fn(p)
}

// errNotFound says that a source that must exist does not.
func errNotFound(path string) error { return fmt.Errorf("%q: not found", "/"+path) }

// selectSources finds what the sources lead to in a view. They are absolute
// paths; wildcards may match nothing, but paths without one must exist.
// Symlinks that a source names are followed inside the view.
func selectSources(v snapshot.View, sources []string) (*selection, error) {
	sel := &selection{view: v}
	for _, src := range sources {
		paths, err := expandWildcards(v, snapshot.Clean(src))
		if err != nil {
			return nil, err
		}
		for _, p := range paths {
			e, err := snapshot.Stat(v, p)
			if errors.Is(err, fs.ErrNotExist) || errors.Is(err, syscall.ENOTDIR) {
				return nil, errNotFound(snapshot.Clean(src))
			}
			if err != nil {
				return nil, err
			}
			_, name := snapshot.Split(p)
			sel.items = append(sel.items, selected{name: name, entry: e})
		}
	}
	return sel, nil
}

// expandWildcards returns the paths that a pattern matches, sorted, or the
// pattern itself if it has no wildcard. Elements before the first one with a
// wildcard are followed through symlinks; those after it are not.
func expandWildcards(v snapshot.View, pattern string) ([]string, error) {
	elements := strings.Split(pattern, "/")
	n := 0
	for n < len(elements) && !hasWildcard(elements[n]) {
		n++
	}
	if n == len(elements) {
		return []string{pattern}, nil
	}
	start, err := snapshot.Resolve(v, strings.Join(elements[:n], "/"), true)
	if err != nil {
		return nil, err
	}
	found := []string{start}
	for _, el := range elements[n:] {
		var next []string
		for _, dir := range found {
			entries, err := v.ReadDir(dir)
			if errors.Is(err, fs.ErrNotExist) || errors.Is(err, syscall.ENOTDIR) {
				continue
			}
			if err != nil {
				return nil, err
			}
			for _, e := range entries {
				// A malformed pattern matches nothing, as everywhere.
				if ok, _ := filepath.Match(el, e.Name()); ok {
					next = append(next, e.Path)
				}
			}
		}
		found = next
	}
	return found, nil
}

func hasWildcard(s string) bool {
	for i := 0; i < len(s); i++ {
		switch s[i] {
		case '*', '?', '[':
			return true
		case '\\':
			i++
		}
	}
	return false
}

// freeze reads everything that is selected, and returns the same selection on
// a view that no longer depends on the metadata of the files: what has been
// hashed is what will be copied. digests remembers content across calls.
func (s *selection) freeze(ctx context.Context, digests *contentDigests) (*selection, error) {
	var entries []snapshot.Entry
	for _, it := range s.items {
		err := it.walk(ctx, s.view, func(p picked) error {
			entries = append(entries, p.Entry)
			return nil
		})
		if err != nil {
			return nil, err
		}
	}
	if err := digests.fill(ctx, s.view, entries); err != nil {
		return nil, err
	}
	toc, err := snapshot.NewTOC(linkTargets(entries))
	if err != nil {
		return nil, err
	}
	view, err := snapshot.NewStackView([]snapshot.StackLayer{{TOC: toc, Open: s.view.Open}})
	if err != nil {
		return nil, err
	}
	frozen := &selection{view: view}
	for _, it := range s.items {
		e := it.entry
		if e.Path != "" { // the root is not in a table
			if e, err = view.Lstat(e.Path); err != nil {
				return nil, err
			}
		}
		frozen.items = append(frozen.items, selected{it.name, e, it.only})
	}
	return frozen, nil
}

// linkTargets turns the further names of a file into hard links, which is how
// tables hold them.
func linkTargets(entries []snapshot.Entry) []snapshot.Entry {
	first := map[uint64]string{}
	for i := range entries {
		e := &entries[i]
		if e.Type != snapshot.File || e.Inode == 0 {
			continue
		}
		if name, ok := first[e.Inode]; ok && name != e.Path {
			*e = snapshot.Entry{Path: e.Path, Type: snapshot.Hardlink, Link: name}
			continue
		}
		first[e.Inode] = e.Path
	}
	return entries
}

// digest is the hash of everything that a copy of the selection depends on:
// names, types, modes, content, links and capabilities. Times do not matter,
// nor does where the selection lies. Owners count only if withOwner is set.
func (s *selection) digest(ctx context.Context, withOwner bool) (string, error) {
	h := sha256.New()
	text := func(t string) {
		binary.Write(h, binary.LittleEndian, uint64(len(t)))
		io.WriteString(h, t)
	}
	number := func(n uint64) { binary.Write(h, binary.LittleEndian, n) }
	for _, it := range s.items {
		text("item")
		if it.entry.Type != snapshot.Dir {
			text(it.name) // becomes the name in the image if the destination is a directory
		}
		links := map[uint64]string{}
		err := it.walk(ctx, s.view, func(e picked) error {
			text(e.rel)
			number(uint64(e.Type))
			number(uint64(e.Mode))
			if withOwner {
				number(uint64(e.UID)<<32 | uint64(e.GID))
			}
			switch e.Type {
			case snapshot.File:
				h.Write(e.Digest[:])
				text(e.Xattrs[snapshot.Capability])
				if e.Inode != 0 {
					first, ok := links[e.Inode]
					if !ok {
						links[e.Inode], first = e.rel, e.rel
					}
					text(first)
				}
			case snapshot.Symlink:
				text(e.Link)
			case snapshot.Char, snapshot.Block:
				number(uint64(e.Major)<<32 | uint64(e.Minor))
			}
			return nil
		})
		if err != nil {
			return "", err
		}
	}
	return fmt.Sprintf("sha256:%x", h.Sum(nil)), nil
}

// contentDigests remembers the digests of files of one view.
type contentDigests struct {
	mu    sync.Mutex
	known map[string][32]byte
}

// fill gives every File among the entries its digest. Files are read in
// parallel, each one once in a build.
func (d *contentDigests) fill(ctx context.Context, v snapshot.View, entries []snapshot.Entry) error {
	group, ctx := errgroup.WithContext(ctx)
	next := make(chan *snapshot.Entry)
	group.Go(func() error {
		defer close(next)
		for i := range entries {
			e := &entries[i]
			if e.Type != snapshot.File || e.HasDigest() {
				continue
			}
			select {
			case next <- e:
			case <-ctx.Done():
				return context.Cause(ctx)
			}
		}
		return nil
	})
	for range runtime.GOMAXPROCS(0) {
		group.Go(func() error {
			buf := make([]byte, 256<<10)
			for e := range next {
				if err := d.one(ctx, v, e, buf); err != nil {
					return err
				}
			}
			return nil
		})
	}
	return group.Wait()
}

func (d *contentDigests) one(ctx context.Context, v snapshot.View, e *snapshot.Entry, buf []byte) error {
	d.mu.Lock()
	known, ok := d.known[e.Path]
	d.mu.Unlock()
	if ok {
		e.Digest = known
		return nil
	}
	r, err := v.Open(ctx, e.Path)
	if err != nil {
		return err
	}
	defer r.Close()
	h := sha256.New()
	n, err := io.CopyBuffer(struct{ io.Writer }{h}, struct{ io.Reader }{r}, buf)
	if err != nil {
		return fmt.Errorf("read /%s: %w", e.Path, err)
	}
	e.Size = n // it may have grown since it was listed: what was read counts
	e.Digest = [32]byte(h.Sum(nil))
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.known == nil {
		d.known = map[string][32]byte{}
	}
	d.known[e.Path] = e.Digest
	return nil
}
