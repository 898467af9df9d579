package snapshot

import (
	"archive/tar"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"os"
	"sync"
	"time"
)

// whiteoutPrefix and opaqueName are how a layer's tar spells deletions: see
// "Whiteouts" in the OCI image specification's layer.md.
const (
	whiteoutPrefix = ".wh."
	opaqueName     = ".wh..wh..opq"
)

// xattrRecord is the PAX record that holds an extended attribute, followed by
// the attribute's name.
const xattrRecord = "SCHILY.xattr."

// ErrContentChanged says that a file was not the same when its layer was
// written as when it was looked at.
var ErrContentChanged = errors.New("file changed while it was being read")

// WriteLayer writes the layer that consists of changes, which must be sorted
// and complete as Draft.Changes and ScanUpper return them, to w, as an
// uncompressed tar. Equal changes give equal bytes: PAX headers only where
// needed, times in whole seconds, no user or group names. It returns the
// layer's table of contents, in which every File whose content was read has
// its digest if the change had one.
//
// A file whose size is no longer that of its entry, or whose content does not
// have its entry's digest, makes WriteLayer fail with ErrContentChanged.
func WriteLayer(ctx context.Context, w io.Writer, changes []Change) (*TOC, error) {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	files := prefetch(ctx, changes)
	defer files.stop()
	tw := tar.NewWriter(w)
	entries := make([]Entry, len(changes))
	for i := range changes {
		c := &changes[i]
		if err := ctx.Err(); err != nil {
			return nil, context.Cause(ctx)
		}
		if err := tw.WriteHeader(header(&c.Entry)); err != nil {
			return nil, fmt.Errorf("write layer: /%s: %w", c.Path, err)
		}
		if c.Type == File && c.Size > 0 {
			if err := files.copy(ctx, tw, i); err != nil {
				return nil, err
			}
		}
		entries[i] = c.Entry
		entries[i].ModTime = seconds(c.ModTime) * 1e9
		if c.Type == Whiteout {
			entries[i] = Entry{Path: c.Path, Type: Whiteout}
		}
	}
	if err := tw.Close(); err != nil {
		return nil, fmt.Errorf("write layer: %w", err)
	}
	return NewTOC(entries)
}

// header is the tar header of e as other builders write it.
func header(e *Entry) *tar.Header {
	if e.Type == Whiteout {
		dir, name := Split(e.Path)
		return &tar.Header{
			Typeflag: tar.TypeReg, Name: Join(dir, whiteoutPrefix+name),
			ModTime: time.Unix(0, 0), Format: tar.FormatPAX,
		}
	}
	h := &tar.Header{
		Name: e.Path, Mode: int64(e.Mode), Uid: int(e.UID), Gid: int(e.GID),
		ModTime: time.Unix(seconds(e.ModTime), 0), Format: tar.FormatPAX,
	}
	switch e.Type {
	case Dir:
		h.Typeflag = tar.TypeDir
		h.Name += "/"
	case Symlink:
		h.Typeflag, h.Linkname = tar.TypeSymlink, e.Link
	case Hardlink:
		h.Typeflag, h.Linkname = tar.TypeLink, e.Link
	case Char, Block:
		h.Typeflag = tar.TypeChar
		if e.Type == Block {
			h.Typeflag = tar.TypeBlock
		}
		h.Devmajor, h.Devminor = int64(e.Major), int64(e.Minor)
	case Fifo:
		h.Typeflag = tar.TypeFifo
	default:
		h.Typeflag, h.Size = tar.TypeReg, e.Size
	}
	if v, ok := e.Xattrs[Capability]; ok {
		h.PAXRecords = map[string]string{xattrRecord + Capability: v}
	}
	return h
}

// Layers are written in order, but most of a small file's cost is opening it.
// So a few goroutines read small files ahead of the writer, into a bounded
// number of buffers.
const (
	smallFile   = 128 << 10 // read ahead whole; larger ones are streamed
	readers     = 4
	readsAhead  = 64 // at most 8 MiB
	copyBufSize = 256 << 10
)

type prefetcher struct {
	changes []Change
	cancel  context.CancelFunc
	wg      sync.WaitGroup
	slots   []chan read // by index of change, nil for what is not read ahead
	next    chan int
	tokens  chan struct{}
	bufs    sync.Pool
	copyBuf []byte
}

type read struct {
	data *[]byte
	err  error
}

func prefetch(ctx context.Context, changes []Change) *prefetcher {
	ctx, cancel := context.WithCancel(ctx)
	p := &prefetcher{
		changes: changes, cancel: cancel,
		slots: make([]chan read, len(changes)), next: make(chan int), tokens: make(chan struct{}, readsAhead),
		bufs: sync.Pool{New: func() any { b := make([]byte, 0, smallFile); return &b }},
	}
	small := 0
	for i := range changes {
		if c := &changes[i]; c.Type == File && c.Size > 0 && c.Size <= smallFile {
			small++
		}
	}
	if small < 2 {
		clear(p.slots)
		return p
	}
	for i := range changes {
		if c := &changes[i]; c.Type == File && c.Size > 0 && c.Size <= smallFile {
			p.slots[i] = make(chan read, 1)
		}
	}
	p.wg.Go(func() {
		defer close(p.next)
		for i := range changes {
			if p.slots[i] == nil {
				continue
			}
			select {
			case p.tokens <- struct{}{}:
			case <-ctx.Done():
				return
			}
			select {
			case p.next <- i:
			case <-ctx.Done():
				return
			}
		}
	})
	for range readers {
		p.wg.Go(func() {
			for i := range p.next {
				p.slots[i] <- p.read(ctx, &changes[i])
			}
		})
	}
	return p
}

// stop ends all goroutines and waits for them.
func (p *prefetcher) stop() {
	p.cancel()
	p.wg.Wait()
}

func (p *prefetcher) read(ctx context.Context, c *Change) read {
	r, err := c.From.Open(ctx, c.FromPath)
	if err != nil {
		return read{err: err}
	}
	defer r.Close()
	buf := p.bufs.Get().(*[]byte)
	*buf = (*buf)[:c.Size]
	if _, err := io.ReadFull(r, *buf); err != nil {
		return read{err: c.readError(err)}
	}
	if err := c.checkEnd(r); err != nil {
		return read{err: err}
	}
	if c.HasDigest() && sha256.Sum256(*buf) != c.Digest {
		return read{err: c.changedError()}
	}
	return read{data: buf}
}

func (p *prefetcher) copy(ctx context.Context, w io.Writer, i int) error {
	c := &p.changes[i]
	if p.slots[i] == nil {
		return p.stream(ctx, w, c)
	}
	select {
	case r := <-p.slots[i]:
		<-p.tokens
		p.slots[i] = nil
		if r.err != nil {
			return r.err
		}
		_, err := w.Write(*r.data)
		p.bufs.Put(r.data)
		return err
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}

// stream copies the content of a large file.
func (p *prefetcher) stream(ctx context.Context, w io.Writer, c *Change) error {
	r, err := c.From.Open(ctx, c.FromPath)
	if err != nil {
		return err
	}
	defer r.Close()
	if p.copyBuf == nil {
		p.copyBuf = make([]byte, copyBufSize)
	}
	h := sha256.New()
	for left := c.Size; left > 0; {
		if err := ctx.Err(); err != nil {
			return context.Cause(ctx)
		}
		buf := p.copyBuf[:min(left, copyBufSize)]
		if _, err := io.ReadFull(r, buf); err != nil {
			return c.readError(err)
		}
		if c.HasDigest() {
			h.Write(buf)
		}
		if _, err := w.Write(buf); err != nil {
			return err
		}
		left -= int64(len(buf))
	}
	if c.HasDigest() && [32]byte(h.Sum(nil)) != c.Digest {
		return c.changedError()
	}
	return c.checkEnd(r)
}

func (c *Change) readError(err error) error {
	if err == io.EOF || err == io.ErrUnexpectedEOF {
		return c.changedError()
	}
	return fmt.Errorf("read %s: %w", c.source(), err)
}

func (c *Change) changedError() error {
	return fmt.Errorf("%s: %w", c.source(), ErrContentChanged)
}

// checkEnd makes sure that nothing follows the content.
func (c *Change) checkEnd(r io.Reader) error {
	if f, ok := r.(*os.File); ok {
		fi, err := f.Stat()
		if err != nil {
			return err
		}
		if fi.Size() != c.Size {
			return c.changedError()
		}
		return nil
	}
	var one [1]byte
	if n, _ := r.Read(one[:]); n > 0 {
		return c.changedError()
	}
	return nil
}

func (c *Change) source() string { return "/" + c.FromPath }
