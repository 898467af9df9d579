// Package cachetest holds the contract of cache tables, which every
// implementation, real or fake, has to pass.
package cachetest

import (
	"context"
	"slices"
	"sync"
	"testing"
	"time"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/ondol-dev/ondol/pkg/cache"
)

// Entry returns an entry for a key made of name, whose layer is content.
func Entry(name, content string) cache.Entry {
	r := cache.Recipe{}
	r.Add("name", name)
	return cache.Entry{
		Key:    r.Key(),
		Layer:  ocispec.Descriptor{MediaType: ocispec.MediaTypeImageLayerGzip, Digest: digest.FromString(content), Size: int64(len(content))},
		DiffID: digest.FromString("diff " + content), Parent: digest.FromString("parent"),
		Created: time.Unix(1_700_000_000, 0).UTC(), Seconds: 1.5, Recipe: r.Components,
	}
}

// Table checks that what open returns is a table. open is called once for each
// view of one and the same table: views have no memory in common, as builders
// on different machines have not. put makes the blob with the content
// available to entries of the table.
func Table(t *testing.T, open func(t *testing.T) cache.Table, put func(t *testing.T, content string)) {
	ctx := context.Background()
	a, b := Entry("a", "content a"), Entry("b", "content b")
	lookup := func(t *testing.T, keys ...cache.Key) map[cache.Key][]cache.Entry {
		t.Helper()
		got, err := open(t).Lookup(ctx, keys)
		if err != nil {
			t.Fatal(err)
		}
		return got
	}
	if got := lookup(t, a.Key, b.Key); len(got) != 0 {
		t.Fatalf("an empty table has %v", got)
	}
	put(t, "content a")
	put(t, "content b")
	if err := open(t).Store(ctx, []cache.Entry{a}); err != nil {
		t.Fatal(err)
	}
	got := lookup(t, a.Key, b.Key)
	if len(got) != 1 || len(got[a.Key]) != 1 {
		t.Fatalf("after a was stored, the table has %v", got)
	}
	if g := got[a.Key][0]; g.Layer.Digest != a.Layer.Digest || g.Layer.Size != a.Layer.Size || g.DiffID != a.DiffID ||
		g.Parent != a.Parent || !g.Created.Equal(a.Created) || g.Seconds != a.Seconds || !slices.Equal(g.Recipe, a.Recipe) {
		t.Errorf("stored %+v, found %+v", a, g)
	}
	// Adding does not remove.
	if err := open(t).Store(ctx, []cache.Entry{b}); err != nil {
		t.Fatal(err)
	}
	if got := lookup(t, a.Key, b.Key); len(got) != 2 {
		t.Errorf("after b was stored, the table has %v", got)
	}
	// The newest outcome of a step comes first.
	again := Entry("a", "content b")
	again.Parent = digest.FromString("other parent")
	if err := open(t).Store(ctx, []cache.Entry{again}); err != nil {
		t.Fatal(err)
	}
	if got := lookup(t, a.Key); len(got[a.Key]) == 0 || got[a.Key][0].Parent != again.Parent {
		t.Errorf("after a was stored again, the table has %v", got)
	}
	// Many at a time, from several sides: none may fail.
	var wg sync.WaitGroup
	for i := range 4 {
		wg.Go(func() {
			e := Entry(string(rune('c'+i)), "content a")
			if err := open(t).Store(ctx, []cache.Entry{e}); err != nil {
				t.Errorf("concurrent store: %v", err)
			}
			if _, err := open(t).Lookup(ctx, []cache.Key{e.Key, a.Key}); err != nil {
				t.Errorf("concurrent look-up: %v", err)
			}
		})
	}
	wg.Wait()
	if got := lookup(t, b.Key); len(got) != 1 {
		t.Errorf("after concurrent stores, b is gone")
	}
}
