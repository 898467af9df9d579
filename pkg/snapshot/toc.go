package snapshot

import (
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	"iter"
	"math"
	"slices"
	"sort"
	"unsafe"
)

// A TOC is the table of contents of one layer: its entries in the order of
// ComparePaths, made complete with an implicit entry for every directory that
// the layer passes through but does not carry. It is immutable and safe for
// concurrent use.
//
// The table is used as it is stored: look-ups are binary searches over the
// encoded bytes, so that opening the table of 80,000 paths costs one read and
// one checksum, and no allocation per path.
type TOC struct {
	data    []byte
	records []byte
	arena   []byte
	n       int
}

// The encoded form, all integers little-endian:
//
//	magic    8 bytes   "ONDOLTOC"
//	version  uint32    1
//	count    uint32    number of records
//	arena    uint64    length of the arena in bytes
//	records  count × 88 bytes
//	arena    paths, link targets, extended attributes
//	crc32c   uint32    over all that precedes it
//
// A record:
//
//	 0 uint32 path offset     4 uint16 path length   6 uint8 type   7 uint8 flags
//	 8 uint32 mode           12 uint32 uid          16 uint32 gid
//	20 uint32 index of the first record that is not below this one
//	24 uint64 size, or major<<32|minor of a device
//	32 int64  modification time in ns
//	40 uint32 link offset    44 uint32 link length
//	48 uint32 xattr offset   52 uint32 xattr length
//	56 32 bytes digest
const (
	tocMagic      = "ONDOLTOC"
	tocVersion    = 1
	tocHeaderSize = 8 + 4 + 4 + 8
	tocRecordSize = 88

	flagOpaque   = 1
	flagImplicit = 2
)

var castagnoli = crc32.MakeTable(crc32.Castagnoli)

// ErrDamaged says that a stored table of contents cannot be used. Whoever
// reads one from a cache treats it as absent.
var ErrDamaged = errors.New("damaged table of contents")

// DecodeTOC wraps encoded bytes, which it keeps and which must not change.
// Any fault in them is an error that wraps ErrDamaged.
func DecodeTOC(data []byte) (*TOC, error) {
	if len(data) < tocHeaderSize+4 || string(data[:8]) != tocMagic {
		return nil, fmt.Errorf("%w: bad header", ErrDamaged)
	}
	if v := binary.LittleEndian.Uint32(data[8:]); v != tocVersion {
		return nil, fmt.Errorf("%w: version %d, want %d", ErrDamaged, v, tocVersion)
	}
	n := uint64(binary.LittleEndian.Uint32(data[12:]))
	arena := binary.LittleEndian.Uint64(data[16:])
	if want := tocHeaderSize + n*tocRecordSize + arena + 4; arena > math.MaxUint32 || uint64(len(data)) != want {
		return nil, fmt.Errorf("%w: %d bytes, want %d", ErrDamaged, len(data), want)
	}
	body := data[:len(data)-4]
	if crc32.Checksum(body, castagnoli) != binary.LittleEndian.Uint32(data[len(body):]) {
		return nil, fmt.Errorf("%w: wrong checksum", ErrDamaged)
	}
	mid := tocHeaderSize + n*tocRecordSize
	t := &TOC{data: data, records: body[tocHeaderSize:mid], arena: body[mid:], n: int(n)}
	if err := t.check(); err != nil {
		return nil, err
	}
	return t, nil
}

// check makes sure that no record points outside the arena or the table, so
// that no later access can panic, whoever made the bytes.
func (t *TOC) check() error {
	size := uint64(len(t.arena))
	for i := range t.n {
		r := t.record(i)
		path := uint64(binary.LittleEndian.Uint32(r)) + uint64(binary.LittleEndian.Uint16(r[4:]))
		link := uint64(binary.LittleEndian.Uint32(r[40:])) + uint64(binary.LittleEndian.Uint32(r[44:]))
		xattr := uint64(binary.LittleEndian.Uint32(r[48:])) + uint64(binary.LittleEndian.Uint32(r[52:]))
		end := int64(binary.LittleEndian.Uint32(r[20:]))
		if path > size || link > size || xattr > size || end <= int64(i) || end > int64(t.n) {
			return fmt.Errorf("%w: record %d points outside the table", ErrDamaged, i)
		}
	}
	return nil
}

// Encode returns the stored form, which the caller must not change.
func (t *TOC) Encode() []byte { return t.data }

// Len returns the number of entries.
func (t *TOC) Len() int { return t.n }

func (t *TOC) record(i int) []byte {
	return t.records[i*tocRecordSize : (i+1)*tocRecordSize]
}

func (t *TOC) str(off, n uint32) string {
	if n == 0 {
		return ""
	}
	// The bytes never change and the string keeps them alive.
	return unsafe.String(&t.arena[off], int(n))
}

func (t *TOC) path(i int) string {
	r := t.record(i)
	return t.str(binary.LittleEndian.Uint32(r), uint32(binary.LittleEndian.Uint16(r[4:])))
}

// end returns the index of the first entry that is not below entry i.
func (t *TOC) end(i int) int {
	return int(binary.LittleEndian.Uint32(t.record(i)[20:]))
}

// At returns entry i, 0 <= i < Len().
func (t *TOC) At(i int) Entry {
	r := t.record(i)
	e := Entry{
		Path:     t.path(i),
		Type:     Type(r[6]),
		Opaque:   r[7]&flagOpaque != 0,
		Implicit: r[7]&flagImplicit != 0,
		Mode:     binary.LittleEndian.Uint32(r[8:]),
		UID:      binary.LittleEndian.Uint32(r[12:]),
		GID:      binary.LittleEndian.Uint32(r[16:]),
		ModTime:  int64(binary.LittleEndian.Uint64(r[32:])),
		Link:     t.str(binary.LittleEndian.Uint32(r[40:]), binary.LittleEndian.Uint32(r[44:])),
		Xattrs:   decodeXattrs(t.str(binary.LittleEndian.Uint32(r[48:]), binary.LittleEndian.Uint32(r[52:]))),
		Digest:   [32]byte(r[56:88]),
	}
	size := binary.LittleEndian.Uint64(r[24:])
	if e.Type == Char || e.Type == Block {
		e.Major, e.Minor = uint32(size>>32), uint32(size)
	} else {
		e.Size = int64(size)
	}
	return e
}

// All yields the entries in order.
func (t *TOC) All() iter.Seq[Entry] {
	return func(yield func(Entry) bool) {
		for i := range t.n {
			if !yield(t.At(i)) {
				return
			}
		}
	}
}

// Find returns the index of the entry at path.
func (t *TOC) Find(path string) (int, bool) {
	return t.find(path, 0, t.n)
}

// find searches the entries lo <= i < hi.
func (t *TOC) find(path string, lo, hi int) (int, bool) {
	i := lo + sort.Search(hi-lo, func(i int) bool { return ComparePaths(t.path(lo+i), path) >= 0 })
	return i, i < hi && t.path(i) == path
}

// children yields the indexes of the entries directly below entry i, or
// directly below the root if i is -1.
func (t *TOC) children(i int) iter.Seq[int] {
	next, last := 0, t.n
	if i >= 0 {
		next, last = i+1, t.end(i)
	}
	return func(yield func(int) bool) {
		for next < last {
			if !yield(next) {
				return
			}
			next = t.end(next)
		}
	}
}

// NewTOC builds the table of a layer that has these entries, in any order. If
// a path comes more than once, the last one counts, and one that is not a
// directory removes what came before it below its path. The slice is sorted
// in place.
func NewTOC(entries []Entry) (*TOC, error) {
	entries = normalize(entries)
	if len(entries) > math.MaxUint32 {
		return nil, fmt.Errorf("table of contents: %d entries are too many", len(entries))
	}
	arena := 0
	for i := range entries {
		e := &entries[i]
		if len(e.Path) > math.MaxUint16 {
			return nil, fmt.Errorf("table of contents: path of %d bytes is too long", len(e.Path))
		}
		arena += len(e.Path) + len(e.Link) + xattrsSize(e.Xattrs)
	}
	if arena > math.MaxUint32 {
		return nil, fmt.Errorf("table of contents: %d bytes of names are too many", arena)
	}
	data := make([]byte, tocHeaderSize+len(entries)*tocRecordSize, tocHeaderSize+len(entries)*tocRecordSize+arena+4)
	copy(data, tocMagic)
	binary.LittleEndian.PutUint32(data[8:], tocVersion)
	binary.LittleEndian.PutUint32(data[12:], uint32(len(entries)))
	binary.LittleEndian.PutUint64(data[16:], uint64(arena))
	start := len(data)
	add := func(s string) (off uint32) {
		off = uint32(len(data) - start)
		data = append(data, s...)
		return off
	}
	ends := subtreeEnds(entries)
	for i := range entries {
		e := &entries[i]
		r := data[tocHeaderSize+i*tocRecordSize:][:tocRecordSize]
		binary.LittleEndian.PutUint32(r, add(e.Path))
		binary.LittleEndian.PutUint16(r[4:], uint16(len(e.Path)))
		r[6] = byte(e.Type)
		if e.Opaque {
			r[7] |= flagOpaque
		}
		if e.Implicit {
			r[7] |= flagImplicit
		}
		binary.LittleEndian.PutUint32(r[8:], e.Mode)
		binary.LittleEndian.PutUint32(r[12:], e.UID)
		binary.LittleEndian.PutUint32(r[16:], e.GID)
		binary.LittleEndian.PutUint32(r[20:], ends[i])
		size := uint64(e.Size)
		if e.Type == Char || e.Type == Block {
			size = uint64(e.Major)<<32 | uint64(e.Minor)
		}
		binary.LittleEndian.PutUint64(r[24:], size)
		binary.LittleEndian.PutUint64(r[32:], uint64(e.ModTime))
		binary.LittleEndian.PutUint32(r[40:], add(e.Link))
		binary.LittleEndian.PutUint32(r[44:], uint32(len(e.Link)))
		off := len(data)
		data = appendXattrs(data, e.Xattrs)
		binary.LittleEndian.PutUint32(r[48:], uint32(off-start))
		binary.LittleEndian.PutUint32(r[52:], uint32(len(data)-off))
		copy(r[56:], e.Digest[:])
	}
	data = binary.LittleEndian.AppendUint32(data, crc32.Checksum(data, castagnoli))
	mid := tocHeaderSize + len(entries)*tocRecordSize
	return &TOC{data: data, records: data[tocHeaderSize:mid], arena: data[mid : len(data)-4], n: len(entries)}, nil
}

// normalize sorts the entries, resolves duplicates and adds the directories
// that are passed through.
func normalize(entries []Entry) []Entry {
	slices.SortStableFunc(entries, func(a, b Entry) int { return ComparePaths(a.Path, b.Path) })
	out := entries[:0:len(entries)]
	for i := range entries {
		if n := len(out); n > 0 && out[n-1].Path == entries[i].Path {
			out[n-1] = mergeSame(out[n-1], entries[i])
			continue
		}
		out = append(out, entries[i])
	}
	entries = out
	out = make([]Entry, 0, len(entries))
	for _, e := range entries {
		if e.Path == "" {
			continue // the root is a directory everywhere; layers do not change it
		}
		if blocked(out, e.Path) {
			continue
		}
		out = appendParents(out, e.Path)
		out = append(out, e)
	}
	return out
}

// mergeSame is what two entries of one path are together: the last one counts,
// but deletions speak of lower layers and only add to what the layer brings.
func mergeSame(a, b Entry) Entry {
	if b.Type == Whiteout || (b.Implicit && a.Type == Dir) {
		a, b = b, a
	}
	if b.Type == Dir {
		b.Opaque = b.Opaque || a.Opaque || a.Type == Whiteout
		b.Implicit = b.Implicit && (a.Type != Dir || a.Implicit)
	}
	return b
}

// blocked reports whether an ancestor of path is present and no directory.
func blocked(sorted []Entry, path string) bool {
	for dir, _ := Split(path); dir != ""; dir, _ = Split(dir) {
		if i, ok := search(sorted, dir); ok {
			return sorted[i].Type != Dir
		}
	}
	return false
}

func appendParents(out []Entry, path string) []Entry {
	dir, _ := Split(path)
	if dir == "" {
		return out
	}
	if _, ok := search(out, dir); ok {
		return out
	}
	out = appendParents(out, dir)
	return append(out, Entry{Path: dir, Type: Dir, Mode: 0o755, Implicit: true})
}

func search(sorted []Entry, path string) (int, bool) {
	return slices.BinarySearchFunc(sorted, path, func(e Entry, p string) int { return ComparePaths(e.Path, p) })
}

func subtreeEnds(entries []Entry) []uint32 {
	ends := make([]uint32, len(entries))
	var open []int // indexes of the directories that the current entry is in
	for i := range entries {
		for len(open) > 0 && !below(entries[i].Path, entries[open[len(open)-1]].Path) {
			ends[open[len(open)-1]] = uint32(i)
			open = open[:len(open)-1]
		}
		open = append(open, i)
	}
	for _, i := range open {
		ends[i] = uint32(len(entries))
	}
	return ends
}

// below reports whether path lies below dir.
func below(path, dir string) bool {
	if dir == "" {
		return path != ""
	}
	return len(path) > len(dir) && path[len(dir)] == '/' && path[:len(dir)] == dir
}
