package snapshot

import (
	"bufio"
	"crypto/sha256"
	"fmt"
	"hash"
	"io"
	"runtime"

	kgzip "github.com/klauspost/compress/gzip"
	"github.com/klauspost/compress/zstd"
	"github.com/klauspost/pgzip"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// Compression says how a layer's tar becomes its blob. The zero value is gzip
// at its default level.
type Compression struct {
	// Kind is "gzip", "zstd" or "none"; "" is gzip.
	Kind string
	// Level is the kind's own scale; 0 is its default.
	Level int
}

// Media types of layers in Docker's schema 2 manifests.
const (
	mediaTypeDockerLayer     = "application/vnd.docker.image.rootfs.diff.tar.gzip"
	mediaTypeDockerTar       = "application/vnd.docker.image.rootfs.diff.tar"
	mediaTypeDockerZstd      = "application/vnd.docker.image.rootfs.diff.tar.zstd"
	mediaTypeDockerForeign   = "application/vnd.docker.image.rootfs.foreign.diff.tar.gzip"
	pgzipBlock               = 1 << 20 // part of the output format: never depends on the machine
	defaultGzipLevel         = 5       // measured: reference figures in docs/performance.md
	readBufferSize           = 1 << 20
	zstdDecoderMaxWindowSize = 128 << 20
)

// MediaType is the OCI media type of a layer compressed in this way.
func (c Compression) MediaType() string {
	switch c.Kind {
	case "zstd":
		return ocispec.MediaTypeImageLayerZstd
	case "none":
		return ocispec.MediaTypeImageLayer
	}
	return ocispec.MediaTypeImageLayerGzip
}

// A LayerWriter compresses a layer's tar on its way to a blob. Use it from one
// goroutine; the results are valid after Close.
type LayerWriter struct {
	compressor io.WriteCloser
	diff       hash.Hash
	blob       hash.Hash
	size       int64
	dst        io.Writer
	media      string
}

// NewLayerWriter returns a writer of tar bytes whose compressed form goes to
// dst. The bytes that dst gets depend on the input only, not on the number of
// cores.
func NewLayerWriter(dst io.Writer, c Compression) (*LayerWriter, error) {
	w := &LayerWriter{diff: sha256.New(), blob: sha256.New(), dst: dst, media: c.MediaType()}
	var err error
	switch c.Kind {
	case "", "gzip":
		w.compressor, err = newGzipWriter(blobSide{w}, c.Level)
	case "zstd":
		level := zstd.SpeedDefault
		if c.Level > 0 {
			level = zstd.EncoderLevelFromZstd(c.Level)
		}
		w.compressor, err = zstd.NewWriter(blobSide{w}, zstd.WithEncoderLevel(level),
			zstd.WithEncoderConcurrency(1), zstd.WithLowerEncoderMem(true))
	case "none":
		w.compressor = nopCloser{blobSide{w}}
	default:
		return nil, fmt.Errorf("unknown compression %q: use gzip, zstd or none", c.Kind)
	}
	return w, err
}

func newGzipWriter(dst io.Writer, level int) (io.WriteCloser, error) {
	if level == 0 {
		level = defaultGzipLevel
	}
	w, err := pgzip.NewWriterLevel(dst, level)
	if err != nil {
		return nil, err
	}
	return w, w.SetConcurrency(pgzipBlock, runtime.GOMAXPROCS(0)+1)
}

// Write takes the next bytes of the tar.
func (w *LayerWriter) Write(p []byte) (int, error) {
	w.diff.Write(p)
	return w.compressor.Write(p)
}

// Close ends the blob. It does not close the destination.
func (w *LayerWriter) Close() error { return w.compressor.Close() }

// DiffID is the digest of the tar.
func (w *LayerWriter) DiffID() digest.Digest { return digest.NewDigest(digest.SHA256, w.diff) }

// Descriptor describes the blob.
func (w *LayerWriter) Descriptor() ocispec.Descriptor {
	return ocispec.Descriptor{MediaType: w.media, Digest: digest.NewDigest(digest.SHA256, w.blob), Size: w.size}
}

// blobSide is where the compressor writes to.
type blobSide struct{ w *LayerWriter }

func (b blobSide) Write(p []byte) (int, error) {
	n, err := b.w.dst.Write(p)
	b.w.blob.Write(p[:n])
	b.w.size += int64(n)
	return n, err
}

type nopCloser struct{ io.Writer }

func (nopCloser) Close() error { return nil }

// Decompress returns the tar that a layer blob of this media type contains.
// The form is told from the content, since media types have been known to lie;
// the media type only says that it is a layer at all.
func Decompress(r io.Reader, mediaType string) (io.ReadCloser, error) {
	switch mediaType {
	case ocispec.MediaTypeImageLayer, ocispec.MediaTypeImageLayerGzip, ocispec.MediaTypeImageLayerZstd,
		mediaTypeDockerLayer, mediaTypeDockerTar, mediaTypeDockerZstd:
	//lint:ignore SA1019 old images have such layers
	case ocispec.MediaTypeImageLayerNonDistributable, ocispec.MediaTypeImageLayerNonDistributableGzip,
		//lint:ignore SA1019 as above
		ocispec.MediaTypeImageLayerNonDistributableZstd, mediaTypeDockerForeign:
	default:
		return nil, fmt.Errorf("layer has unknown media type %q", mediaType)
	}
	return decompress(bufio.NewReaderSize(r, readBufferSize))
}

func decompress(br *bufio.Reader) (io.ReadCloser, error) {
	magic, err := br.Peek(4)
	if err != nil && err != io.EOF {
		return nil, err
	}
	switch {
	case len(magic) >= 2 && magic[0] == 0x1f && magic[1] == 0x8b:
		z, err := kgzip.NewReader(br)
		if err != nil {
			return nil, fmt.Errorf("gzip: %w", err)
		}
		return z, nil
	case len(magic) >= 4 && magic[0] == 0x28 && magic[1] == 0xb5 && magic[2] == 0x2f && magic[3] == 0xfd:
		z, err := zstd.NewReader(br, zstd.WithDecoderConcurrency(1), zstd.WithDecoderMaxWindow(zstdDecoderMaxWindowSize))
		if err != nil {
			return nil, fmt.Errorf("zstd: %w", err)
		}
		return z.IOReadCloser(), nil
	}
	return io.NopCloser(br), nil
}
