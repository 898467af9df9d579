package snapshot

import (
	"cmp"
	"io/fs"
	"strings"
	"time"
)

// Type says what a path in a layer is.
type Type uint8

// The types of an Entry. Hardlink and Whiteout exist only inside layers: a
// View resolves them and never returns one.
const (
	File Type = iota + 1
	Dir
	Symlink
	Hardlink
	Char
	Block
	Fifo
	Whiteout
)

func (t Type) String() string {
	names := [...]string{"?", "file", "dir", "symlink", "hardlink", "char", "block", "fifo", "whiteout"}
	if int(t) < len(names) {
		return names[t]
	}
	return names[0]
}

// Entry is one path of a layer or of a view, with everything that a layer
// records about it.
type Entry struct {
	// Path is slash-separated, relative to the root and clean; "" is the root.
	Path string
	Type Type
	// Opaque marks a Dir that hides what lower layers have below it.
	Opaque bool
	// Implicit marks a Dir that the layer's tar does not carry: something
	// below it does. Its metadata is that of the layers below.
	Implicit bool
	// Mode holds the permission bits with setuid, setgid and sticky (07777).
	Mode     uint32
	UID, GID uint32
	// Size is the length of a File's content in bytes.
	Size int64
	// ModTime is in nanoseconds since the Unix epoch.
	ModTime int64
	// Link is the target of a Symlink as written, or the Path that a Hardlink
	// shares its file with.
	Link         string
	Major, Minor uint32
	// Xattrs holds extended attributes by full name. It is shared between
	// copies of an Entry and must not be changed in place.
	Xattrs map[string]string
	// Digest is the SHA-256 of a File's content; all zero when not known.
	Digest [32]byte
	// Inode is equal for the entries of one View that are hard links of each
	// other, and zero for files that have one name only.
	Inode uint64
}

// Name returns the last element of the entry's path.
func (e *Entry) Name() string {
	return e.Path[strings.LastIndexByte(e.Path, '/')+1:]
}

// Time returns ModTime as a time in UTC.
func (e *Entry) Time() time.Time { return time.Unix(0, e.ModTime).UTC() }

// HasDigest reports whether the content's digest is known.
func (e *Entry) HasDigest() bool { return e.Digest != [32]byte{} }

// Capability is the extended attribute that holds a file's capabilities, the
// only one that layers written here carry, as everywhere in the field.
const Capability = "security.capability"

// sameMeta reports whether two entries of one path agree in all that a layer
// would record, except for times and content.
func sameMeta(a, b *Entry) bool {
	return a.Type == b.Type && a.Mode == b.Mode && a.UID == b.UID && a.GID == b.GID &&
		a.Major == b.Major && a.Minor == b.Minor &&
		a.Xattrs[Capability] == b.Xattrs[Capability]
}

// layerXattrs keeps of m what a layer carries.
func layerXattrs(m map[string]string) map[string]string {
	v, ok := m[Capability]
	if !ok {
		return nil
	}
	if len(m) == 1 {
		return m
	}
	return map[string]string{Capability: v}
}

// ComparePaths orders paths so that a directory comes directly before all that
// is below it, and siblings come in byte order: '/' sorts before every other
// byte. It is the order of every layer and table of contents.
func ComparePaths(a, b string) int {
	n := min(len(a), len(b))
	for i := range n {
		x, y := a[i], b[i]
		if x == y {
			continue
		}
		if x == '/' {
			return -1
		}
		if y == '/' {
			return 1
		}
		return cmp.Compare(x, y)
	}
	return cmp.Compare(len(a), len(b))
}

// Join joins a directory's path and a name; dir "" is the root.
func Join(dir, name string) string {
	if dir == "" {
		return name
	}
	return dir + "/" + name
}

// Split is the inverse of Join.
func Split(path string) (dir, name string) {
	i := strings.LastIndexByte(path, '/')
	if i < 0 {
		return "", path
	}
	return path[:i], path[i+1:]
}

// Clean turns any path into the form that Entry.Path has: "/a//b/../c/" is
// "a/c". It never leads above the root.
func Clean(path string) string {
	var parts []string
	for p := range strings.SplitSeq(path, "/") {
		switch p {
		case "", ".":
		case "..":
			if len(parts) > 0 {
				parts = parts[:len(parts)-1]
			}
		default:
			parts = append(parts, p)
		}
	}
	return strings.Join(parts, "/")
}

func notExist(op, path string) error {
	return &fs.PathError{Op: op, Path: "/" + path, Err: fs.ErrNotExist}
}
