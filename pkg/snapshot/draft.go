package snapshot

import (
	"context"
	"errors"
	"io"
	"io/fs"
	"slices"
	"sort"
	"syscall"
)

// A Draft is a view plus changes that exist only in memory. It is how files
// are copied into an image without a root file system: the copy is made in the
// draft, with the rules of a real file system, and Changes is the layer. A
// Draft is itself a View. It must not be used from several goroutines.
type Draft struct {
	lower  View
	root   *node
	inodes uint64
}

// NewInode returns a number for Entry.Inode that no other file of the draft
// has.
func (d *Draft) NewInode() uint64 {
	d.inodes++
	return 1<<63 | d.inodes
}

// node is a path that the draft knows more about than the lower view does.
type node struct {
	name     string
	set      bool // the draft has made or changed this path; entry holds
	gone     bool // the draft has removed this path
	hides    bool // nothing of the lower view shows below this path
	entry    Entry
	from     View
	fromPath string
	children []*node // sorted by name
}

// NewDraft returns a draft without changes on top of lower.
func NewDraft(lower View) *Draft {
	return &Draft{lower: lower, root: &node{}}
}

// child returns the position of the child called name, and whether there is
// one.
func (n *node) child(name string) (int, bool) {
	if k := len(n.children); k > 0 && n.children[k-1].name < name {
		return k, false // copies come sorted
	}
	i := sort.Search(len(n.children), func(i int) bool { return n.children[i].name >= name })
	return i, i < len(n.children) && n.children[i].name == name
}

// find returns the node of path, if the draft has one, and whether the lower
// view shows at path as far as the draft knows.
func (d *Draft) find(path string) (n *node, shows bool) {
	n, shows = d.root, true
	for rest := path; rest != ""; {
		var name string
		name, rest = cut(rest)
		if n.hides || n.gone {
			shows = false
		}
		i, ok := n.child(name)
		if !ok {
			return nil, shows
		}
		n = n.children[i]
	}
	return n, shows && !n.gone
}

func cut(path string) (first, rest string) {
	for i := range len(path) {
		if path[i] == '/' {
			return path[:i], path[i+1:]
		}
	}
	return path, ""
}

// Lstat implements View.
func (d *Draft) Lstat(path string) (Entry, error) {
	n, shows := d.find(path)
	if n != nil && n.set {
		return n.entry, nil
	}
	if n != nil && n.gone || !shows {
		return Entry{}, d.absent(path)
	}
	return d.lower.Lstat(path)
}

// absent is the error for a path that is not there.
func (d *Draft) absent(path string) error {
	for dir, _ := Split(path); dir != ""; dir, _ = Split(dir) {
		if e, err := d.Lstat(dir); err == nil {
			if e.Type != Dir {
				return notDir("lstat", dir)
			}
			break
		}
	}
	return notExist("lstat", path)
}

// ReadDir implements View.
func (d *Draft) ReadDir(path string) ([]Entry, error) {
	e, err := d.Lstat(path)
	if err != nil {
		return nil, err
	}
	if e.Type != Dir {
		return nil, notDir("readdir", path)
	}
	n, shows := d.find(path)
	var out []Entry
	if shows && (n == nil || !n.hides) {
		if out, err = d.lower.ReadDir(path); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return nil, err
		}
	}
	if n == nil {
		return out, nil
	}
	out = slices.DeleteFunc(slices.Clone(out), func(e Entry) bool {
		i, ok := n.child(e.Name())
		return ok && (n.children[i].set || n.children[i].gone)
	})
	for _, c := range n.children {
		if c.set {
			out = append(out, c.entry)
		}
	}
	slices.SortFunc(out, func(a, b Entry) int { return ComparePaths(a.Path, b.Path) })
	return out, nil
}

// Open implements View.
func (d *Draft) Open(ctx context.Context, path string) (io.ReadCloser, error) {
	if n, _ := d.find(path); n != nil && n.set {
		if n.entry.Type != File {
			return nil, &fs.PathError{Op: "open", Path: "/" + path, Err: errors.New("is a " + n.entry.Type.String())}
		}
		return n.from.Open(ctx, n.fromPath)
	}
	if _, err := d.Lstat(path); err != nil {
		return nil, err
	}
	return d.lower.Open(ctx, path)
}

// Source returns the entry at path and where its content is, for making
// another name for the same file with Put.
func (d *Draft) Source(path string) (e Entry, from View, fromPath string, err error) {
	if n, _ := d.find(path); n != nil && n.set {
		return n.entry, n.from, n.fromPath, nil
	}
	e, err = d.Lstat(path)
	return e, d.lower, path, err
}

// make returns the node of path and creates it and those above it as needed.
func (d *Draft) make(path string) *node {
	n := d.root
	for rest := path; rest != ""; {
		var name string
		name, rest = cut(rest)
		i, ok := n.child(name)
		if !ok {
			c := &node{name: name}
			if i == len(n.children) {
				n.children = append(n.children, c)
			} else {
				n.children = slices.Insert(n.children, i, c)
			}
		}
		n = n.children[i]
	}
	return n
}

// Put makes e, whose Path must lie in an existing directory. A directory in
// place of a directory changes that one's metadata; everything else replaces
// what is there. A File's content is what from has at fromPath.
func (d *Draft) Put(e Entry, from View, fromPath string) error {
	dir, _ := Split(e.Path)
	parent, err := d.Lstat(dir)
	if err != nil {
		return err
	}
	if parent.Type != Dir {
		return notDir("create", e.Path)
	}
	old, err := d.Lstat(e.Path)
	exists := err == nil
	if err != nil && !errors.Is(err, fs.ErrNotExist) && !errors.Is(err, syscall.ENOTDIR) {
		return err
	}
	n := d.make(e.Path)
	if e.Type != Dir || !exists || old.Type != Dir {
		n.children, n.hides = nil, true
	}
	n.set, n.gone = true, false
	n.entry, n.from, n.fromPath = e, from, fromPath
	return nil
}

// Remove removes path and all that is below it. It is no error if there is
// nothing.
func (d *Draft) Remove(path string) {
	n := d.make(path)
	*n = node{name: n.name, gone: true}
}

// Changes returns the layer that turns the lower view into the draft, sorted
// and complete with parents. What was put but is equal to what the lower view
// has is left out.
func (d *Draft) Changes(ctx context.Context) ([]Change, error) {
	var out []Change
	if err := d.collect(ctx, d.root, "", true, &out); err != nil {
		return nil, err
	}
	return complete(out, d)
}

// collect adds the changes at and below n. shows says whether the lower view
// has something to say about path.
func (d *Draft) collect(ctx context.Context, n *node, path string, shows bool, out *[]Change) error {
	c := Change{Entry: n.entry, From: n.from, FromPath: n.fromPath}
	switch {
	case n.gone:
		if shows && d.inLower(path) {
			*out = append(*out, Change{Entry: Entry{Path: path, Type: Whiteout}})
		}
	case n.set && path != "":
		c.Xattrs = layerXattrs(c.Xattrs)
		same := false
		if shows {
			var err error
			if same, err = c.unchanged(ctx, d.lower); err != nil {
				return err
			}
		}
		if !same {
			*out = append(*out, c)
		}
	}
	if err := d.collectHidden(n, path, shows, out); err != nil {
		return err
	}
	for _, child := range n.children {
		if err := d.collect(ctx, child, Join(path, child.name), shows && !n.gone, out); err != nil {
			return err
		}
	}
	return nil
}

// collectHidden adds whiteouts for what a new directory hides of an old one:
// what the draft puts there instead is compared, not deleted first.
func (d *Draft) collectHidden(n *node, path string, shows bool, out *[]Change) error {
	if !shows || !n.hides || !n.set || n.entry.Type != Dir {
		return nil
	}
	if e, err := d.lower.Lstat(path); err != nil || e.Type != Dir {
		return nil
	}
	old, err := d.lower.ReadDir(path)
	if err != nil {
		return err
	}
	for _, e := range old {
		if _, ok := n.child(e.Name()); !ok {
			*out = append(*out, Change{Entry: Entry{Path: e.Path, Type: Whiteout}})
		}
	}
	return nil
}

func (d *Draft) inLower(path string) bool {
	_, err := d.lower.Lstat(path)
	return err == nil
}
