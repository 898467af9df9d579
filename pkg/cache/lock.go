package cache

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"time"

	"golang.org/x/sys/unix"
)

// lock takes the lock called name, which all processes on the volume share,
// and waits for it as long as ctx lasts. Locks end with the process that holds
// them.
func (d *Disk) lock(ctx context.Context, name string) (unlock func(), err error) {
	if d.readOnly {
		return func() {}, nil
	}
	path := filepath.Join(d.dir, "locks", name)
	// flock cannot be interrupted in Go, so it is tried again and again; what
	// is waited for takes much longer than the longest pause.
	for pause := time.Millisecond; ; pause = min(2*pause, 100*time.Millisecond) {
		f, err := lockFile(path, unix.LOCK_EX|unix.LOCK_NB)
		if err == nil {
			return func() {
				os.Remove(path) // while it is locked: see lockFile
				f.Close()
			}, nil
		}
		if !errors.Is(err, unix.EWOULDBLOCK) {
			return nil, err
		}
		select {
		case <-time.After(pause):
		case <-ctx.Done():
			return nil, context.Cause(ctx)
		}
	}
}
