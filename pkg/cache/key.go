package cache

import (
	"crypto/sha256"
	"encoding/binary"
	"encoding/hex"
	"fmt"
	"hash"
)

// keyVersion is part of every key. It changes whenever the meaning of a
// recipe's components changes, so that no version is misled by another's
// entries.
const keyVersion = "ondol key 1"

// A Key identifies what a step has been asked to do.
type Key [sha256.Size]byte

func (k Key) String() string { return hex.EncodeToString(k[:]) }

// MarshalText implements encoding.TextMarshaler.
func (k Key) MarshalText() ([]byte, error) { return []byte(k.String()), nil }

// UnmarshalText implements encoding.TextUnmarshaler.
func (k *Key) UnmarshalText(b []byte) error {
	if len(b) == hex.EncodedLen(len(k)) {
		if _, err := hex.Decode(k[:], b); err == nil {
			return nil
		}
	}
	return fmt.Errorf("invalid cache key %.100q", b)
}

// A Component is one thing that decides a step's output.
type Component struct {
	Name  string `json:"name"`
	Value string `json:"value"`
}

// A Recipe collects the components of a key, in order. One recipe makes the
// key for looking up and for storing, and its components are kept beside the
// entry, so that a later miss can be explained.
//
// Components are framed: their number, order, names and boundaries all count.
type Recipe struct {
	Components []Component
}

// Add appends a component.
func (r *Recipe) Add(name, value string) {
	r.Components = append(r.Components, Component{name, value})
}

// Key is the hash of the recipe.
func (r *Recipe) Key() Key {
	h := sha256.New()
	frame(h, keyVersion)
	for _, c := range r.Components {
		frame(h, c.Name)
		frame(h, c.Value)
	}
	return Key(h.Sum(nil))
}

// frame writes s with its length before it.
func frame(h hash.Hash, s string) {
	var n [8]byte
	binary.LittleEndian.PutUint64(n[:], uint64(len(s)))
	h.Write(n[:])
	h.Write([]byte(s))
}
