package cache

import (
	"encoding/json"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"time"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// A Ref says what an image name leads to, and where that is known from.
type Ref struct {
	// Name is the full name: "docker.io/library/busybox:latest".
	Name string `json:"name"`
	// Target is the manifest or index that the name leads to. Its content, as
	// far as it was needed, is among the blobs.
	Target ocispec.Descriptor `json:"target"`
	// Checked is when the registry was last asked.
	Checked time.Time `json:"checked"`
	// Imported is set if the image came from a file and not from a registry:
	// then the name means this image, and no registry is asked.
	Imported bool `json:"imported,omitempty"`
	// From says where the image came from, for people to read.
	From string `json:"from,omitempty"`
}

func (d *Disk) refPath(name string) string {
	return "refs/" + digest.FromString(name).Encoded() + ".json"
}

// Ref returns what the volume knows of an image name. The error wraps
// fs.ErrNotExist if that is nothing.
func (d *Disk) Ref(name string) (Ref, error) {
	return readRef(filepath.Join(d.dir, d.refPath(name)))
}

func readRef(path string) (Ref, error) {
	var r Ref
	b, err := os.ReadFile(path)
	if err != nil {
		return r, err
	}
	if err := json.Unmarshal(b, &r); err != nil || r.Target.Digest.Validate() != nil {
		return Ref{}, fmt.Errorf("reference %s: damaged: %w", path, fs.ErrNotExist)
	}
	return r, nil
}

// PutRef stores what an image name leads to. What it leads to must be there.
func (d *Disk) PutRef(r Ref) error {
	b, err := json.MarshalIndent(r, "", "  ")
	if err != nil {
		return err
	}
	return d.writeFile(d.refPath(r.Name), append(b, '\n'))
}

// touchEvery is how often it is noted that an image name was used: not with
// each build, since what is written must reach the disk.
const touchEvery = time.Hour

// touch notes that an image name was used: by the time of its file, which
// builders without another way of telling the warmer can all set.
func (d *Disk) touch(name string) {
	if d.readOnly {
		return
	}
	path := filepath.Join(d.dir, d.refPath(name))
	now := time.Now()
	if fi, err := os.Stat(path); err == nil && now.Sub(fi.ModTime()) > touchEvery {
		os.Chtimes(path, now, now) // at worst, the image seems older than it is
	}
}

// LastUse returns when an image name was last used, give or take an hour.
func (d *Disk) LastUse(name string) time.Time {
	fi, err := os.Stat(filepath.Join(d.dir, d.refPath(name)))
	if err != nil {
		return time.Time{}
	}
	return fi.ModTime()
}

// Refs returns all image names that the volume knows, sorted.
func (d *Disk) Refs() ([]Ref, error) {
	names, err := filepath.Glob(filepath.Join(d.dir, "refs", "*.json"))
	if err != nil {
		return nil, err
	}
	var out []Ref
	for _, n := range names {
		if r, err := readRef(n); err == nil {
			out = append(out, r)
		}
	}
	slices.SortFunc(out, func(a, b Ref) int {
		if a.Name < b.Name {
			return -1
		}
		return 1
	})
	return out, nil
}
