package cache

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"slices"
	"sync"
	"time"

	"github.com/klauspost/compress/zstd"
	"github.com/opencontainers/go-digest"
	"github.com/opencontainers/image-spec/specs-go"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/ondol-dev/ondol/internal/registry"
)

// The remote table is an OCI image manifest. Its config is the table itself,
// as JSON compressed with zstd, inside the manifest if it is small; its layers
// are all the blobs that entries speak of, so that the registry keeps them and
// lets them be mounted elsewhere.
const (
	mediaTypeTable   = "application/vnd.ondol.cache.table.v1+zstd"
	artifactTypeName = "application/vnd.ondol.cache.v1"

	remoteVersion = 1
	// inlineTable is the size up to which the table is put into the manifest
	// itself, which saves a round trip. Registries take 4 MiB.
	inlineTable = 64 << 10
	// maxTable bounds what is read as a table, decompressed.
	maxTable = 32 << 20
	// entriesPerKey bounds how many outcomes of one definition are kept.
	entriesPerKey = 3
)

// remoteTable is the JSON form.
type remoteTable struct {
	Version int           `json:"version"`
	Entries []remoteEntry `json:"entries"`
}

type remoteEntry struct {
	Entry
	// Used is when a build has last made use of the entry, give or take.
	Used time.Time `json:"used"`
}

// RemoteStore is where a remote table lives: a registry's repository, or an
// OCI layout.
type RemoteStore interface {
	// Manifest returns what is stored under tag. The error wraps
	// registry.ErrNotFound if that is nothing.
	Manifest(ctx context.Context, tag string) ([]byte, error)
	// Blob returns a blob's content, not verified.
	Blob(ctx context.Context, desc ocispec.Descriptor) (io.ReadCloser, error)
	PushBlob(ctx context.Context, b registry.Blob) (registry.How, error)
	PushManifest(ctx context.Context, tag, mediaType string, content []byte) error
}

// RemoteOptions say how a remote table is used.
type RemoteOptions struct {
	// Shard tells tables in one repository apart that different builds write.
	Shard string
	// TTL is how long an entry stays that no build uses. 0 is two weeks.
	TTL time.Duration
}

// A Remote is a table in a registry. It is read as a whole, in one or two
// round trips, when it is first asked; and written as a whole, merged with
// what others have written meanwhile. If two writers meet, one's entries are
// lost: that costs a miss later on, never an error.
type Remote struct {
	store RemoteStore
	tag   string
	ttl   time.Duration
	now   func() time.Time

	mu     sync.Mutex
	loaded bool
	known  remoteTable
}

// defaultTTL is Kaniko's.
const defaultTTL = 14 * 24 * time.Hour

// NewRemote returns the table of a shard. Nothing is read yet.
func NewRemote(store RemoteStore, opts RemoteOptions) *Remote {
	if opts.TTL <= 0 {
		opts.TTL = defaultTTL
	}
	return &Remote{store: store, tag: "cache-" + digest.FromString(opts.Shard).Encoded()[:24], ttl: opts.TTL, now: time.Now}
}

// Tag is the tag under which the table is stored.
func (r *Remote) Tag() string { return r.tag }

// Lookup implements Table.
func (r *Remote) Lookup(ctx context.Context, keys []Key) (map[Key][]Entry, error) {
	table, err := r.table(ctx)
	if err != nil {
		return nil, err
	}
	want := make(map[Key]bool, len(keys))
	for _, k := range keys {
		want[k] = true
	}
	out := map[Key][]Entry{}
	for _, e := range table.Entries {
		if want[e.Key] && r.now().Sub(e.Used) < r.ttl {
			out[e.Key] = append(out[e.Key], e.Entry)
		}
	}
	return out, nil
}

// table returns the table as it was when it was first read.
func (r *Remote) table(ctx context.Context) (remoteTable, error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.loaded {
		return r.known, nil
	}
	t, err := r.read(ctx)
	if err != nil {
		return remoteTable{}, err
	}
	r.known, r.loaded = t, true
	return t, nil
}

// read fetches the table. A table that is absent, damaged or of a version that
// is not known is empty.
func (r *Remote) read(ctx context.Context) (remoteTable, error) {
	b, err := r.store.Manifest(ctx, r.tag)
	if errors.Is(err, registry.ErrNotFound) {
		return remoteTable{}, nil
	}
	if err != nil {
		return remoteTable{}, err
	}
	var m ocispec.Manifest
	if err := json.Unmarshal(b, &m); err != nil || m.Config.MediaType != mediaTypeTable {
		return remoteTable{}, nil
	}
	content := m.Config.Data
	if len(content) == 0 {
		if content, err = r.readBlob(ctx, m.Config); err != nil {
			if errors.Is(err, registry.ErrNotFound) {
				return remoteTable{}, nil
			}
			return remoteTable{}, err
		}
	}
	if digest.FromBytes(content) != m.Config.Digest {
		return remoteTable{}, nil
	}
	t, err := decodeTable(content)
	if err != nil {
		return remoteTable{}, nil
	}
	return t, nil
}

func (r *Remote) readBlob(ctx context.Context, desc ocispec.Descriptor) ([]byte, error) {
	if desc.Size > maxTable {
		return nil, fmt.Errorf("cache table %s: its %d bytes are too many", desc.Digest, desc.Size)
	}
	rc, err := r.store.Blob(ctx, desc)
	if err != nil {
		return nil, err
	}
	defer rc.Close()
	return io.ReadAll(io.LimitReader(rc, maxTable))
}

func decodeTable(content []byte) (remoteTable, error) {
	z, err := zstd.NewReader(nil, zstd.WithDecoderConcurrency(1), zstd.WithDecoderMaxMemory(maxTable))
	if err != nil {
		return remoteTable{}, err
	}
	defer z.Close()
	plain, err := z.DecodeAll(content, nil)
	if err != nil {
		return remoteTable{}, err
	}
	var t remoteTable
	if err := json.Unmarshal(plain, &t); err != nil {
		return remoteTable{}, err
	}
	if t.Version != remoteVersion {
		return remoteTable{}, fmt.Errorf("cache table: unknown version %d", t.Version)
	}
	t.Entries = slices.DeleteFunc(t.Entries, func(e remoteEntry) bool { return e.validate() != nil })
	return t, nil
}

func encodeTable(t remoteTable) ([]byte, error) {
	plain, err := json.Marshal(t)
	if err != nil {
		return nil, err
	}
	z, err := zstd.NewWriter(nil, zstd.WithEncoderConcurrency(1))
	if err != nil {
		return nil, err
	}
	defer z.Close()
	return z.EncodeAll(plain, nil), nil
}

// PushLayer puts a layer's blob where the table's blobs are. It must come
// before the Store of the layer's entry.
func (r *Remote) PushLayer(ctx context.Context, b registry.Blob) (registry.How, error) {
	return r.store.PushBlob(ctx, b)
}

// Store implements Table.
func (r *Remote) Store(ctx context.Context, entries []Entry) error {
	return r.Update(ctx, entries, nil)
}

// touchAfter is the part of the TTL after which a use of an entry is written
// down: so that builds which find everything need not write the table each
// time.
const touchAfter = 8

// Update adds entries and notes which older ones were used. If there is
// nothing worth writing, nothing is.
func (r *Remote) Update(ctx context.Context, add []Entry, used []Key) error {
	if len(add) == 0 && !r.worthTouching(ctx, used) {
		return nil
	}
	t, err := r.read(ctx) // again: others have written since
	if err != nil {
		return err
	}
	t = r.merge(t, add, used)
	content, err := encodeTable(t)
	if err != nil {
		return err
	}
	config := ocispec.Descriptor{MediaType: mediaTypeTable, Digest: digest.FromBytes(content), Size: int64(len(content))}
	blob := registry.Blob{Descriptor: config, Fresh: true, Open: func(context.Context) (io.ReadCloser, error) {
		return nopReadCloser(content), nil
	}}
	if _, err := r.store.PushBlob(ctx, blob); err != nil {
		return err
	}
	if len(content) <= inlineTable {
		config.Data = content
	}
	m := ocispec.Manifest{
		Versioned: specs.Versioned{SchemaVersion: 2}, MediaType: ocispec.MediaTypeImageManifest,
		ArtifactType: artifactTypeName, Config: config, Layers: layersOf(t),
	}
	b, err := json.Marshal(m)
	if err != nil {
		return err
	}
	return r.store.PushManifest(ctx, r.tag, m.MediaType, b)
}

func (r *Remote) worthTouching(ctx context.Context, used []Key) bool {
	if len(used) == 0 {
		return false
	}
	t, err := r.table(ctx)
	if err != nil {
		return false
	}
	for _, e := range t.Entries {
		if slices.Contains(used, e.Key) && r.now().Sub(e.Used) > r.ttl/touchAfter {
			return true
		}
	}
	return false
}

// merge returns t with the new entries in front, those that were used marked,
// and those that nobody uses any more gone.
func (r *Remote) merge(t remoteTable, add []Entry, used []Key) remoteTable {
	now := r.now().UTC().Truncate(time.Second)
	out := remoteTable{Version: remoteVersion}
	perKey := map[Key]int{}
	seen := map[string]bool{}
	take := func(e remoteEntry) {
		id := e.Key.String() + string(e.Parent)
		if seen[id] || perKey[e.Key] == entriesPerKey {
			return
		}
		seen[id] = true
		perKey[e.Key]++
		out.Entries = append(out.Entries, e)
	}
	for _, e := range add {
		take(remoteEntry{e, now})
	}
	for _, e := range t.Entries {
		if slices.Contains(used, e.Key) {
			e.Used = now
		}
		if now.Sub(e.Used) < r.ttl {
			take(e)
		}
	}
	return out
}

// layersOf lists the blobs of a table's entries, each once.
func layersOf(t remoteTable) []ocispec.Descriptor {
	seen := map[digest.Digest]bool{}
	out := []ocispec.Descriptor{} // "layers" must be there even if empty
	for _, e := range t.Entries {
		if !seen[e.Layer.Digest] {
			seen[e.Layer.Digest] = true
			out = append(out, e.Layer)
		}
	}
	return out
}
