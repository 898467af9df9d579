package cache

import (
	"context"
	"errors"
	"fmt"
	"io"
	"sync"

	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/ondol-dev/ondol/internal/registry"
)

// A Tier is a table together with the place where the blobs of its entries
// are.
type Tier struct {
	// Name is how messages call the tier: "volume", or a repository.
	Name string
	Table
	// Open returns a blob's content, not verified.
	Open func(ctx context.Context, desc ocispec.Descriptor) (io.ReadCloser, error)
	// Repository holds the blobs, if they are in a registry: then another
	// repository there can have them without any copying.
	Repository *registry.Repository
}

// A Hit is an entry and the tier that has it.
type Hit struct {
	Entry
	Tier *Tier
}

// Tiered asks several tiers at once.
type Tiered []*Tier

// Lookup returns for each key what the tiers have, in the tiers' order. Errors
// of single tiers are joined and returned beside what the others have found.
func (t Tiered) Lookup(ctx context.Context, keys []Key) (map[Key][]Hit, error) {
	found := make([]map[Key][]Entry, len(t))
	errs := make([]error, len(t))
	var wg sync.WaitGroup
	for i, tier := range t {
		wg.Go(func() {
			var err error
			if found[i], err = tier.Lookup(ctx, keys); err != nil {
				errs[i] = fmt.Errorf("cache %s: %w", tier.Name, err)
			}
		})
	}
	wg.Wait()
	out := map[Key][]Hit{}
	for i, tier := range t {
		for k, entries := range found[i] {
			for _, e := range entries {
				out[k] = append(out[k], Hit{e, tier})
			}
		}
	}
	return out, errors.Join(errs...)
}

// VolumeTier is the tier of a volume's own entries in a scope.
func VolumeTier(d *Disk, scope string) *Tier {
	return &Tier{Name: "volume", Table: d.Entries(scope), Open: func(_ context.Context, desc ocispec.Descriptor) (io.ReadCloser, error) {
		return d.OpenBlob(desc)
	}}
}
