package catalog

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"time"

	badger "github.com/dgraph-io/badger/v4"
	"github.com/dgraph-io/badger/v4/options"
	"golang.org/x/sys/unix"
)

const (
	// openSpace is the free space below which the database is not opened, and
	// closeSpace that below which an open one is closed: Badger writes through
	// memory maps of sparse files, and a full disk ends the process with a
	// signal that Go cannot handle.
	openSpace  = 512 << 20
	closeSpace = 256 << 20
	// checkEvery is how often an open database's disk is looked at.
	checkEvery = 3 * time.Second
	// magic changes with what records mean. A database with another one is
	// moved aside.
	magic = 1
)

// ErrUnavailable says that there can be no database here, or not now: another
// process has it open, the disk is nearly full, or the directory lies on a
// network. Whoever gets it goes on without.
var ErrUnavailable = errors.New("the catalog is not available")

// Open opens the database in the directory state of a volume, and makes it if
// there is none. One that is damaged is moved aside, and a fresh one made;
// logf, if not nil, is told. Close it in the end.
func Open(volume string, logf func(format string, args ...any)) (*Catalog, error) {
	if logf == nil {
		logf = func(string, ...any) {}
	}
	dir := filepath.Join(volume, "state")
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return nil, fmt.Errorf("%w: %w", ErrUnavailable, err)
	}
	if err := checkDisk(dir); err != nil {
		return nil, err
	}
	lock, err := lockState(volume)
	if err != nil {
		return nil, err
	}
	defer lock.Close()
	marker := dir + ".opening"
	if _, err := os.Stat(marker); err == nil {
		// Whoever opened it last did not live to see it open.
		logf("the catalog could not be opened the last time: starting a new one")
		if err := quarantine(dir); err != nil {
			return nil, fmt.Errorf("%w: %w", ErrUnavailable, err)
		}
	}
	if err := os.WriteFile(marker, nil, 0o644); err != nil {
		return nil, fmt.Errorf("%w: %w", ErrUnavailable, err)
	}
	db, err := openTwice(dir)
	if err != nil && strings.Contains(err.Error(), "Cannot acquire directory lock") {
		os.Remove(marker)
		return nil, fmt.Errorf("%w: another process has it open", ErrUnavailable)
	}
	if err != nil {
		logf("the catalog cannot be opened: starting a new one: %v", err)
		if err := quarantine(dir); err != nil {
			return nil, fmt.Errorf("%w: %w", ErrUnavailable, err)
		}
		db, err = openOnce(dir)
	}
	if err != nil {
		os.Remove(marker) // a fresh one fails too: it is not the files
		return nil, fmt.Errorf("%w: %w", ErrUnavailable, err)
	}
	if err := os.Remove(marker); err != nil {
		db.Close()
		return nil, fmt.Errorf("%w: %w", ErrUnavailable, err)
	}
	c := &Catalog{db: db, stop: make(chan struct{})}
	c.done.Go(func() { c.watch(dir, logf) })
	return c, nil
}

// Close closes the database. It may be called more than once.
func (c *Catalog) Close() error {
	c.mu.Lock()
	db := c.db
	c.db = nil
	if db != nil {
		close(c.stop)
	}
	c.mu.Unlock()
	c.done.Wait()
	if db == nil {
		return nil
	}
	return db.Close()
}

// watch closes the database when the disk gets full.
func (c *Catalog) watch(dir string, logf func(string, ...any)) {
	tick := time.NewTicker(checkEvery)
	defer tick.Stop()
	for {
		select {
		case <-c.stop:
			return
		case <-tick.C:
		}
		if free, err := freeSpace(dir); err != nil || free >= closeSpace {
			continue
		}
		logf("the disk is nearly full: closing the catalog")
		c.mu.Lock()
		db := c.db
		c.db = nil
		c.mu.Unlock()
		if db != nil {
			db.Close()
		}
		return
	}
}

// lockState makes sure that only one process opens, moves and makes the
// database at a time.
func lockState(volume string) (*os.File, error) {
	f, err := os.OpenFile(filepath.Join(volume, "state.lock"), os.O_CREATE|os.O_RDWR, 0o644)
	if err != nil {
		return nil, fmt.Errorf("%w: %w", ErrUnavailable, err)
	}
	if err := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB); err != nil {
		f.Close()
		return nil, fmt.Errorf("%w: another process is opening it", ErrUnavailable)
	}
	return f, nil
}

// networkFileSystems are those on which the locks and memory maps of the
// database do not work, by the magic numbers of statfs(2).
var networkFileSystems = map[int64]string{
	unix.NFS_SUPER_MAGIC: "NFS", unix.SMB_SUPER_MAGIC: "SMB", unix.SMB2_SUPER_MAGIC: "SMB2", unix.CIFS_SUPER_MAGIC: "CIFS",
	unix.AFS_SUPER_MAGIC: "AFS", unix.CODA_SUPER_MAGIC: "Coda", unix.CEPH_SUPER_MAGIC: "Ceph", unix.V9FS_MAGIC: "9p", unix.FUSE_SUPER_MAGIC: "FUSE",
}

func checkDisk(dir string) error {
	var st unix.Statfs_t
	if err := unix.Statfs(dir, &st); err != nil {
		return fmt.Errorf("%w: %w", ErrUnavailable, err)
	}
	if name, ok := networkFileSystems[int64(st.Type)]; ok { // the type depends on the architecture
		return fmt.Errorf("%w: %s lies on %s", ErrUnavailable, dir, name)
	}
	if free := st.Bavail * uint64(st.Bsize); free < openSpace { // as above
		return fmt.Errorf("%w: only %d MB are free on its disk", ErrUnavailable, free>>20)
	}
	return nil
}

func freeSpace(dir string) (uint64, error) {
	var st unix.Statfs_t
	err := unix.Statfs(dir, &st)
	return st.Bavail * uint64(st.Bsize), err // as above
}

// quarantine moves a database aside for whoever wants to look into it. Only
// the last one is kept.
func quarantine(dir string) error {
	bad := dir + ".bad"
	if err := os.RemoveAll(bad); err != nil {
		return err
	}
	if err := os.Rename(dir, bad); err != nil {
		return err
	}
	return os.Mkdir(dir, 0o755)
}

// openTwice opens the database, and tries again if it was left by a process
// that was killed while it made a file: the first attempt then fails, and the
// second does not.
func openTwice(dir string) (*badger.DB, error) {
	removeEmpty(dir)
	db, err := openOnce(dir)
	if err != nil && strings.Contains(err.Error(), "Create a new file") {
		db, err = openOnce(dir)
	}
	return db, err
}

// removeEmpty removes files that were never written.
func removeEmpty(dir string) {
	for _, pattern := range []string{"*.mem", "*.vlog"} {
		names, _ := filepath.Glob(filepath.Join(dir, pattern))
		for _, n := range names {
			if fi, err := os.Stat(n); err == nil && fi.Size() == 0 {
				os.Remove(n)
			}
		}
	}
}

// openOnce opens the database with the least of everything: the catalog of a
// node has hundreds of records, not millions.
func openOnce(dir string) (db *badger.DB, err error) {
	defer func() {
		if p := recover(); p != nil {
			db, err = nil, fmt.Errorf("badger: panic: %v", p)
		}
	}()
	o := badger.DefaultOptions(dir)
	o.MemTableSize = 2 << 20
	o.NumMemtables = 2
	o.ValueLogFileSize = 8 << 20
	o.ValueThreshold = 64 << 10 // above every record: nothing goes into the value log
	o.BlockCacheSize = 0
	o.Compression = options.None
	o.ChecksumVerificationMode = options.OnBlockRead
	o.DetectConflicts = false
	o.MetricsEnabled = false
	o.CompactL0OnClose = true
	o.ExternalMagicVersion = magic
	o.Logger = nil
	return badger.Open(o)
}
