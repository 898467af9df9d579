package registry

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"strconv"
	"strings"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// Media types of Docker's schema 2, beside those of the OCI that the
// image-spec module has.
const (
	MediaTypeDockerManifest = "application/vnd.docker.distribution.manifest.v2+json"
	MediaTypeDockerIndex    = "application/vnd.docker.distribution.manifest.list.v2+json"
	MediaTypeDockerConfig   = "application/vnd.docker.container.image.v1+json"
	MediaTypeDockerLayer    = "application/vnd.docker.image.rootfs.diff.tar.gzip"
)

// maxManifest bounds what is read as a manifest: registries accept 4 MiB.
const maxManifest = 4 << 20

// ErrDigest says that content does not have the digest that it was asked for
// by.
var ErrDigest = errors.New("content does not match its digest")

// IsIndex reports whether a media type is that of a list of manifests.
func IsIndex(mediaType string) bool {
	return mediaType == ocispec.MediaTypeImageIndex || mediaType == MediaTypeDockerIndex
}

// IsManifest reports whether a media type is that of an image's manifest.
func IsManifest(mediaType string) bool {
	return mediaType == ocispec.MediaTypeImageManifest || mediaType == MediaTypeDockerManifest
}

func manifestHeader() http.Header {
	return http.Header{"Accept": {strings.Join([]string{
		ocispec.MediaTypeImageIndex, ocispec.MediaTypeImageManifest, MediaTypeDockerIndex, MediaTypeDockerManifest,
	}, ", ")}}
}

// Head returns the descriptor of the manifest that ref names, with one HEAD
// request. Registries do not count it as a pull.
func (c *Client) Head(ctx context.Context, ref Reference) (ocispec.Descriptor, error) {
	e, err := c.pullFrom(ref.Repository)
	if err != nil {
		return ocispec.Descriptor{}, err
	}
	resp, err := e.do(ctx, &request{method: http.MethodHead, path: "manifests/" + ref.target(), header: manifestHeader(), accept: []int{http.StatusOK}})
	if err != nil {
		return ocispec.Descriptor{}, err
	}
	resp.Body.Close()
	d, err := digest.Parse(resp.Header.Get("Docker-Content-Digest"))
	if err != nil || resp.ContentLength < 0 {
		// Optional headers: ask for the manifest itself.
		desc, _, err := c.Manifest(ctx, ref)
		return desc, err
	}
	return ocispec.Descriptor{MediaType: mediaType(resp), Digest: d, Size: resp.ContentLength}, nil
}

// Manifest returns the manifest or index that ref names. If ref has a digest,
// the content has been verified.
func (c *Client) Manifest(ctx context.Context, ref Reference) (ocispec.Descriptor, []byte, error) {
	e, err := c.pullFrom(ref.Repository)
	if err != nil {
		return ocispec.Descriptor{}, nil, err
	}
	resp, err := e.do(ctx, &request{method: http.MethodGet, path: "manifests/" + ref.target(), header: manifestHeader(), accept: []int{http.StatusOK}})
	if err != nil {
		return ocispec.Descriptor{}, nil, err
	}
	defer resp.Body.Close()
	b, err := io.ReadAll(io.LimitReader(resp.Body, maxManifest+1))
	if err != nil {
		return ocispec.Descriptor{}, nil, fmt.Errorf("manifest %s: %w", ref, err)
	}
	if len(b) > maxManifest {
		return ocispec.Descriptor{}, nil, fmt.Errorf("manifest %s: larger than %d bytes", ref, maxManifest)
	}
	desc := ocispec.Descriptor{MediaType: mediaType(resp), Digest: digest.FromBytes(b), Size: int64(len(b))}
	if ref.Digest != "" {
		if ref.Digest.Algorithm().FromBytes(b) != ref.Digest {
			return ocispec.Descriptor{}, nil, fmt.Errorf("manifest %s: %w: it is %s", ref, ErrDigest, desc.Digest)
		}
		desc.Digest = ref.Digest
	}
	return desc, b, nil
}

func mediaType(resp *http.Response) string {
	t, _, _ := strings.Cut(resp.Header.Get("Content-Type"), ";")
	return strings.TrimSpace(t)
}

// BlobBytes returns a small blob, verified. One that is larger than limit
// bytes is an error.
func (c *Client) BlobBytes(ctx context.Context, repo Repository, desc ocispec.Descriptor, limit int64) ([]byte, error) {
	if desc.Size > limit {
		return nil, fmt.Errorf("blob %s of %s: its %d bytes are more than %d", desc.Digest, repo, desc.Size, limit)
	}
	r, err := c.Blob(ctx, repo, desc)
	if err != nil {
		return nil, err
	}
	defer r.Close()
	b, err := io.ReadAll(io.LimitReader(r, limit+1))
	if err != nil {
		return nil, err
	}
	if desc.Digest.Algorithm().FromBytes(b) != desc.Digest {
		return nil, fmt.Errorf("blob %s of %s: %w", desc.Digest, repo, ErrDigest)
	}
	return b, nil
}

// Blob returns the content of a blob, which is not verified. If the connection
// breaks, the reader goes on where it was, with a request for the rest.
func (c *Client) Blob(ctx context.Context, repo Repository, desc ocispec.Descriptor) (io.ReadCloser, error) {
	if err := desc.Digest.Validate(); err != nil {
		return nil, fmt.Errorf("blob of %s: %w", repo, err)
	}
	e, err := c.pullFrom(repo)
	if err != nil {
		return nil, err
	}
	r := &blobReader{ctx: ctx, endpoint: e, desc: desc}
	if err := r.open(); err != nil {
		return nil, err
	}
	return r, nil
}

type blobReader struct {
	ctx      context.Context // an io.Reader has no other way to take it
	endpoint *endpoint
	desc     ocispec.Descriptor
	body     io.ReadCloser
	offset   int64
	failures int // since the last byte came
}

func (r *blobReader) open() error {
	req := &request{method: http.MethodGet, path: "blobs/" + r.desc.Digest.String(), accept: []int{http.StatusOK}}
	if r.offset > 0 {
		req.header = http.Header{"Range": {r.rest()}}
		req.accept = append(req.accept, http.StatusPartialContent)
	}
	resp, err := r.endpoint.do(r.ctx, req)
	if err != nil {
		return err
	}
	r.body = resp.Body
	if r.offset == 0 {
		return nil
	}
	if resp.StatusCode == http.StatusPartialContent {
		if start, _, _ := strings.Cut(strings.TrimPrefix(resp.Header.Get("Content-Range"), "bytes "), "-"); start == strconv.FormatInt(r.offset, 10) {
			return nil
		}
		resp.Body.Close()
		return fmt.Errorf("blob %s of %s: asked for bytes from %d, got %q", r.desc.Digest, r.endpoint.repo, r.offset, resp.Header.Get("Content-Range"))
	}
	// The registry knows no ranges: skip what is here already.
	_, err = io.CopyN(io.Discard, r.body, r.offset)
	return err
}

func (r *blobReader) Read(p []byte) (int, error) {
	for {
		n, err := r.body.Read(p)
		r.offset += int64(n)
		if n > 0 {
			r.failures = 0
			if err != io.EOF {
				err = nil // comes again with the next read
			}
		}
		if err == nil {
			return n, nil
		}
		if err == io.EOF && (r.desc.Size <= 0 || r.offset >= r.desc.Size) {
			return n, io.EOF
		}
		if n > 0 {
			return n, nil
		}
		if err := r.resume(err); err != nil {
			return 0, err
		}
	}
}

// resume opens the blob again at the present offset.
func (r *blobReader) resume(cause error) error {
	if r.ctx.Err() != nil {
		return context.Cause(r.ctx)
	}
	if cause == io.EOF {
		cause = io.ErrUnexpectedEOF
	}
	for {
		if r.failures++; r.failures > r.endpoint.client.opts.Retries {
			return fmt.Errorf("blob %s of %s: after %d of %d bytes: %w", r.desc.Digest, r.endpoint.repo, r.offset, r.desc.Size, cause)
		}
		wait, _ := retryAfter(io.ErrUnexpectedEOF, r.failures-1)
		if err := sleep(r.ctx, wait); err != nil {
			return err
		}
		r.body.Close()
		if cause = r.open(); cause == nil {
			return nil
		}
	}
}

func (r *blobReader) Close() error { return r.body.Close() }

// rest is the Range header for what is still to come. Both ends are named
// where they are known: not every server takes an open range.
func (r *blobReader) rest() string {
	s := "bytes=" + strconv.FormatInt(r.offset, 10) + "-"
	if r.desc.Size > 0 {
		s += strconv.FormatInt(r.desc.Size-1, 10)
	}
	return s
}
