package cache

import (
	"context"
	"encoding/json"
	"os"
	"path/filepath"
)

// Entries returns the table of the volume's own entries in a scope. Entries of
// which the blob is gone count as missing.
func (d *Disk) Entries(scope string) Table { return &diskTable{d, filepath.Join("keys", scope)} }

type diskTable struct {
	disk *Disk
	dir  string
}

func (t *diskTable) path(k Key) string {
	s := k.String()
	return filepath.Join(t.dir, s[:2], s)
}

func (t *diskTable) Lookup(_ context.Context, keys []Key) (map[Key][]Entry, error) {
	out := map[Key][]Entry{}
	for _, k := range keys {
		b, err := os.ReadFile(filepath.Join(t.disk.dir, t.path(k)))
		if err != nil {
			continue
		}
		var e Entry
		if json.Unmarshal(b, &e) != nil || e.Key != k || e.validate() != nil {
			continue // damage is a miss
		}
		if t.disk.HasBlob(e.Layer) {
			out[k] = []Entry{e}
		}
	}
	return out, nil
}

func (t *diskTable) Store(_ context.Context, entries []Entry) error {
	for _, e := range entries {
		b, err := json.Marshal(e)
		if err != nil {
			return err
		}
		if err := t.disk.writeFile(t.path(e.Key), b); err != nil {
			return err
		}
	}
	return nil
}
