package registry

import (
	"archive/tar"
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"path"

	"github.com/opencontainers/go-digest"
	"github.com/opencontainers/image-spec/specs-go"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// openBytes is Blob.Open for content in memory.
func openBytes(b []byte) func(context.Context) (io.ReadCloser, error) {
	return func(context.Context) (io.ReadCloser, error) { return io.NopCloser(bytes.NewReader(b)), nil }
}

// dockerManifest is one element of manifest.json, by which docker load finds
// an image in an archive.
type dockerManifest struct {
	Config   string
	RepoTags []string
	Layers   []string
}

// WriteArchive writes an image as an archive that is both an OCI layout and
// what docker save writes, so that docker, podman, containerd and skopeo can
// read it. names are the image's full names.
func WriteArchive(ctx context.Context, w io.Writer, mediaType string, manifest []byte, config Blob, layers []Blob, names []Reference) error {
	desc := ocispec.Descriptor{MediaType: mediaType, Digest: digest.FromBytes(manifest), Size: int64(len(manifest))}
	tw := tar.NewWriter(w)
	blobName := func(d digest.Digest) string { return path.Join("blobs", d.Algorithm().String(), d.Encoded()) }
	docker := dockerManifest{Config: blobName(config.Digest), RepoTags: []string{}, Layers: []string{}}
	written := map[digest.Digest]bool{}
	for _, b := range append(append([]Blob{}, layers...), config, Blob{Descriptor: desc, Open: openBytes(manifest)}) {
		if written[b.Digest] {
			continue
		}
		written[b.Digest] = true
		if err := writeArchiveBlob(ctx, tw, blobName(b.Digest), b); err != nil {
			return err
		}
	}
	for _, b := range layers {
		docker.Layers = append(docker.Layers, blobName(b.Digest))
	}
	idx := ocispec.Index{Versioned: specs.Versioned{SchemaVersion: 2}, MediaType: ocispec.MediaTypeImageIndex}
	for _, n := range names {
		d := desc
		d.Annotations = map[string]string{"io.containerd.image.name": n.String(), ocispec.AnnotationRefName: n.Tag}
		idx.Manifests = append(idx.Manifests, d)
		docker.RepoTags = append(docker.RepoTags, n.Familiar())
	}
	if len(names) == 0 {
		idx.Manifests = []ocispec.Descriptor{desc}
	}
	for _, f := range []struct {
		name string
		v    any
	}{
		{ocispec.ImageIndexFile, idx},
		{"manifest.json", []dockerManifest{docker}},
		{ocispec.ImageLayoutFile, ocispec.ImageLayout{Version: ocispec.ImageLayoutVersion}},
	} {
		b, err := json.Marshal(f.v)
		if err != nil {
			return err
		}
		if err := tw.WriteHeader(&tar.Header{Typeflag: tar.TypeReg, Name: f.name, Mode: 0o644, Size: int64(len(b))}); err != nil {
			return err
		}
		if _, err := tw.Write(b); err != nil {
			return err
		}
	}
	return tw.Close()
}

func writeArchiveBlob(ctx context.Context, tw *tar.Writer, name string, b Blob) error {
	r, err := b.Open(ctx)
	if err != nil {
		return err
	}
	defer r.Close()
	if err := tw.WriteHeader(&tar.Header{Typeflag: tar.TypeReg, Name: name, Mode: 0o644, Size: b.Size}); err != nil {
		return err
	}
	v := b.Digest.Verifier()
	if _, err := io.Copy(io.MultiWriter(tw, v), contextReader{ctx, r}); err != nil {
		return fmt.Errorf("blob %s: %w", b.Digest, err)
	}
	if !v.Verified() {
		return fmt.Errorf("blob %s: %w", b.Digest, ErrDigest)
	}
	return nil
}
