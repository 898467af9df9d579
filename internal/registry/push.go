package registry

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/url"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// HasBlob reports whether repo has the blob.
func (c *Client) HasBlob(ctx context.Context, repo Repository, d digest.Digest) (bool, error) {
	e, err := c.pullFrom(repo)
	if err != nil {
		return false, err
	}
	return e.hasBlob(ctx, d)
}

func (e *endpoint) hasBlob(ctx context.Context, d digest.Digest) (bool, error) {
	resp, err := e.do(ctx, &request{method: http.MethodHead, path: "blobs/" + d.String(), accept: []int{http.StatusOK, http.StatusNotFound}})
	if err != nil {
		return false, err
	}
	resp.Body.Close()
	return resp.StatusCode == http.StatusOK, nil
}

// A Blob is something to be pushed.
type Blob struct {
	ocispec.Descriptor
	// Open returns the content. It may be called several times, and is not
	// called at all if the registry has the blob or can mount it.
	Open func(ctx context.Context) (io.ReadCloser, error)
	// From names repositories that hold the blob. The registry takes it from
	// one of its own, if it can.
	From []Repository
	// Fresh says that the registry will not have the blob, so that it is not
	// asked first.
	Fresh bool
}

// How says how a blob has come into a repository.
type How string

// The ways of Push.
const (
	Existed  How = "existed"
	Mounted  How = "mounted"
	Uploaded How = "uploaded"
)

// PushBlob makes sure that repo has the blob, with as little traffic as can be.
func (c *Client) PushBlob(ctx context.Context, repo Repository, b Blob) (How, error) {
	e, err := c.pushTo(repo, b.From...)
	if err != nil {
		return "", err
	}
	if !b.Fresh {
		ok, err := e.hasBlob(ctx, b.Digest)
		if err != nil {
			return "", err
		}
		if ok {
			return Existed, nil
		}
	}
	for attempt := 0; ; attempt++ {
		how, err := e.uploadBlob(ctx, &b)
		if err == nil {
			return how, nil
		}
		if ctx.Err() != nil {
			return "", context.Cause(ctx)
		}
		wait, again := retryAfter(err, attempt)
		if !again || attempt >= c.opts.Retries {
			return "", fmt.Errorf("push layer %s to %s: %w", b.Digest, repo, err)
		}
		if err := sleep(ctx, wait); err != nil {
			return "", err
		}
	}
}

// uploadBlob begins an upload with the wish to mount the blob instead, and
// sends the content in one piece if that is not granted.
func (e *endpoint) uploadBlob(ctx context.Context, b *Blob) (How, error) {
	begin := &request{method: http.MethodPost, path: "blobs/uploads/", accept: []int{http.StatusAccepted, http.StatusCreated}, once: true}
	for _, from := range b.From {
		if from.Host == e.repo.Host && from.Path != e.repo.Path {
			begin.query = url.Values{"mount": {b.Digest.String()}, "from": {from.Path}}
			break
		}
	}
	resp, err := e.do(ctx, begin)
	if err != nil && begin.query != nil && errors.Is(err, ErrUnauthorized) {
		// The right to read the other repository is missing, which some
		// registries count against the whole request.
		begin.query = nil
		if e, err = e.client.pushTo(e.repo); err == nil {
			resp, err = e.do(ctx, begin)
		}
	}
	if err != nil {
		return "", err
	}
	resp.Body.Close()
	if resp.StatusCode == http.StatusCreated {
		return Mounted, nil
	}
	location, err := resp.Location()
	if err != nil {
		return "", fmt.Errorf("upload to %s: the registry gives no place to upload to: %w", e.repo, err)
	}
	put := &request{
		method: http.MethodPut, url: location, query: url.Values{"digest": {b.Digest.String()}},
		header: http.Header{"Content-Type": {"application/octet-stream"}},
		body: func() (body, error) {
			r, err := b.Open(ctx)
			return body{r, b.Size}, err
		},
		accept: []int{http.StatusCreated, http.StatusNoContent}, once: true,
	}
	resp, err = e.do(ctx, put)
	if err != nil {
		return "", err
	}
	resp.Body.Close()
	return Uploaded, nil
}

// PushManifest puts a manifest or index, of which everything else must be
// there, under ref's tag, or its digest if it has no tag.
func (c *Client) PushManifest(ctx context.Context, ref Reference, mediaType string, content []byte) error {
	e, err := c.pushTo(ref.Repository)
	if err != nil {
		return err
	}
	target := ref.Tag
	if target == "" {
		target = digest.FromBytes(content).String()
	}
	resp, err := e.do(ctx, &request{
		method: http.MethodPut, path: "manifests/" + target,
		header: http.Header{"Content-Type": {mediaType}},
		body: func() (body, error) {
			return body{io.NopCloser(bytes.NewReader(content)), int64(len(content))}, nil
		},
		accept: []int{http.StatusOK, http.StatusCreated, http.StatusAccepted, http.StatusNoContent},
	})
	if err != nil {
		return err
	}
	return resp.Body.Close()
}

// CheckPush finds out whether the credentials at hand may write to repo, by
// beginning an upload and giving it up again.
func (c *Client) CheckPush(ctx context.Context, repo Repository) error {
	e, err := c.pushTo(repo)
	if err != nil {
		return err
	}
	resp, err := e.do(ctx, &request{method: http.MethodPost, path: "blobs/uploads/", accept: []int{http.StatusAccepted, http.StatusCreated}})
	if err != nil {
		return err
	}
	resp.Body.Close()
	location, err := resp.Location()
	if err != nil {
		return nil
	}
	// Registries clean up uploads by themselves; this is politeness.
	resp, err = e.do(ctx, &request{method: http.MethodDelete, url: location, accept: []int{http.StatusNoContent, http.StatusAccepted, http.StatusOK}, once: true})
	if err == nil {
		resp.Body.Close()
	}
	return nil
}
