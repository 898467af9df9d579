package catalog

import (
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"hash/crc32"
	"slices"
	"strings"
	"sync"
	"time"

	badger "github.com/dgraph-io/badger/v4"
	"github.com/opencontainers/go-digest"
)

// A Record is what the catalog knows of a warmed image.
type Record struct {
	Name   string        `json:"name"`
	Digest digest.Digest `json:"digest"`
	// Layers is the number of layers, Size what their blobs weigh in bytes, and
	// Unpacked how many of them are unpacked on the volume.
	Layers   int   `json:"layers"`
	Size     int64 `json:"size"`
	Unpacked int   `json:"unpacked"`
	// From says where the image came from: a registry, or a file.
	From string `json:"from"`
	// Warmed is when the image was brought onto the volume, and LastUse when a
	// build or a warmer has last used it, give or take an hour.
	Warmed  time.Time `json:"warmed"`
	LastUse time.Time `json:"lastUse"`
}

// imagePrefix is put before an image's name to make the key of its record.
const imagePrefix = "image/"

// A Catalog is the open database. It is safe for concurrent use. After it has
// closed itself, because the disk is nearly full, all calls return ErrClosed.
type Catalog struct {
	mu   sync.RWMutex
	db   *badger.DB // nil after Close
	stop chan struct{}
	done sync.WaitGroup
}

// ErrClosed says that the database has been closed.
var ErrClosed = errors.New("the catalog is closed")

// errDamaged marks a value that does not have its checksum. It counts as
// absent.
var errDamaged = errors.New("damaged record")

func (c *Catalog) with(fn func(*badger.DB) error) error {
	c.mu.RLock()
	defer c.mu.RUnlock()
	if c.db == nil {
		return ErrClosed
	}
	return fn(c.db)
}

// Put adds or replaces the records of images.
func (c *Catalog) Put(records ...Record) error {
	return c.with(func(db *badger.DB) error {
		return db.Update(func(txn *badger.Txn) error {
			for _, r := range records {
				value, err := encode(r)
				if err != nil {
					return err
				}
				if err := txn.Set([]byte(imagePrefix+r.Name), value); err != nil {
					return fmt.Errorf("catalog: %s: %w", r.Name, err)
				}
			}
			return nil
		})
	})
}

// Delete removes the record of an image. It is no error if there is none.
func (c *Catalog) Delete(name string) error {
	return c.with(func(db *badger.DB) error {
		return db.Update(func(txn *badger.Txn) error { return txn.Delete([]byte(imagePrefix + name)) })
	})
}

// All returns the records of all images, sorted by name.
func (c *Catalog) All() ([]Record, error) {
	var out []Record
	err := c.with(func(db *badger.DB) error {
		return db.View(func(txn *badger.Txn) error {
			it := txn.NewIterator(badger.IteratorOptions{Prefix: []byte(imagePrefix), PrefetchValues: true, PrefetchSize: 64})
			defer it.Close()
			for it.Rewind(); it.Valid(); it.Next() {
				var r Record
				err := it.Item().Value(func(v []byte) (err error) { r, err = decode(v); return err })
				if err == nil {
					out = append(out, r)
				}
			}
			return nil
		})
	})
	slices.SortFunc(out, func(a, b Record) int { return strings.Compare(a.Name, b.Name) })
	return out, err
}

// Reconcile makes the catalog agree with what the files say: records of images
// that are gone go, and those of new ones come. What only the catalog knows,
// such as a later use, stays.
func (c *Catalog) Reconcile(files []Record) error {
	known, err := c.All()
	if err != nil {
		return err
	}
	merged := Merge(known, files)
	for _, r := range known {
		if !slices.ContainsFunc(merged, func(m Record) bool { return m.Name == r.Name }) {
			if err := c.Delete(r.Name); err != nil {
				return err
			}
		}
	}
	return c.Put(merged...)
}

// Merge returns the records of the files, with what the catalog knows better.
func Merge(known, files []Record) []Record {
	out := slices.Clone(files)
	for i := range out {
		for _, k := range known {
			if k.Name != out[i].Name || k.Digest != out[i].Digest {
				continue
			}
			if k.LastUse.After(out[i].LastUse) {
				out[i].LastUse = k.LastUse
			}
			if !k.Warmed.IsZero() && k.Warmed.Before(out[i].Warmed) {
				out[i].Warmed = k.Warmed
			}
		}
	}
	return out
}

// Values carry a checksum of their own: with the options used, Badger finds
// damaged blocks, but it has been seen to return wrong values without an error
// where it was told otherwise.

func encode(r Record) ([]byte, error) {
	b, err := json.Marshal(r)
	if err != nil {
		return nil, err
	}
	return append(binary.LittleEndian.AppendUint32(nil, crc32.ChecksumIEEE(b)), b...), nil
}

func decode(v []byte) (Record, error) {
	var r Record
	if len(v) < 4 || binary.LittleEndian.Uint32(v) != crc32.ChecksumIEEE(v[4:]) {
		return r, errDamaged
	}
	return r, json.Unmarshal(v[4:], &r)
}
