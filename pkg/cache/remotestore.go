package cache

import (
	"bytes"
	"context"
	"io"

	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/ondol-dev/ondol/internal/registry"
)

// RegistryStore is the RemoteStore of a registry's repository.
func RegistryStore(client *registry.Client, repo registry.Repository) RemoteStore {
	return &registryStore{client, repo}
}

type registryStore struct {
	client *registry.Client
	repo   registry.Repository
}

func (s *registryStore) Manifest(ctx context.Context, tag string) ([]byte, error) {
	_, b, err := s.client.Manifest(ctx, registry.Reference{Repository: s.repo, Tag: tag})
	return b, err
}

func (s *registryStore) Blob(ctx context.Context, desc ocispec.Descriptor) (io.ReadCloser, error) {
	return s.client.Blob(ctx, s.repo, desc)
}

func (s *registryStore) PushBlob(ctx context.Context, b registry.Blob) (registry.How, error) {
	return s.client.PushBlob(ctx, s.repo, b)
}

func (s *registryStore) PushManifest(ctx context.Context, tag, mediaType string, content []byte) error {
	return s.client.PushManifest(ctx, registry.Reference{Repository: s.repo, Tag: tag}, mediaType, content)
}

func nopReadCloser(b []byte) io.ReadCloser { return io.NopCloser(bytes.NewReader(b)) }

// LayoutStore is the RemoteStore of an OCI layout, for builds without a
// registry. The format is the same.
func LayoutStore(l *registry.Layout) RemoteStore { return layoutStore{l} }

type layoutStore struct{ *registry.Layout }

func (s layoutStore) Manifest(ctx context.Context, tag string) ([]byte, error) {
	desc, err := s.Find(tag)
	if err != nil {
		return nil, err
	}
	return s.BlobBytes(ctx, desc)
}
