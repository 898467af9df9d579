package cache

import "context"

// A Table maps keys to entries.
type Table interface {
	// Lookup returns for each of the keys the entries that the table has, the
	// best first. Keys without entries are left out. The error says that the
	// table could not be asked, not that something is missing; what was found
	// nevertheless is returned beside it.
	Lookup(ctx context.Context, keys []Key) (map[Key][]Entry, error)
	// Store adds entries. The layers' blobs must be where the table keeps them
	// already.
	Store(ctx context.Context, entries []Entry) error
}
