package registry

import (
	"fmt"
	"strings"

	"github.com/distribution/reference"
	"github.com/opencontainers/go-digest"
)

// A Repository is a place in a registry that holds manifests and blobs.
type Repository struct {
	// Host is the registry as names spell it: "docker.io", "localhost:5000".
	Host string
	// Path is the repository's name within the registry: "library/busybox".
	Path string
}

func (r Repository) String() string { return r.Host + "/" + r.Path }

// A Reference names a manifest: by digest, if there is one, else by tag.
type Reference struct {
	Repository
	Tag    string
	Digest digest.Digest
}

// ParseReference reads an image name as Dockerfiles and command lines have it:
// "busybox" is "docker.io/library/busybox:latest".
func ParseReference(s string) (Reference, error) {
	named, err := reference.ParseNormalizedNamed(s)
	if err != nil {
		return Reference{}, fmt.Errorf("image name %q: %w", s, err)
	}
	r := Reference{Repository: Repository{Host: reference.Domain(named), Path: reference.Path(named)}}
	if d, ok := named.(reference.Digested); ok {
		r.Digest = d.Digest()
	}
	if t, ok := named.(reference.Tagged); ok {
		r.Tag = t.Tag()
	}
	if r.Tag == "" && r.Digest == "" {
		r.Tag = "latest"
	}
	return r, nil
}

// ParseRepository reads the name of a repository. A tag or digest is refused.
func ParseRepository(s string) (Repository, error) {
	named, err := reference.ParseNormalizedNamed(s)
	if err != nil {
		return Repository{}, fmt.Errorf("repository name %q: %w", s, err)
	}
	if !reference.IsNameOnly(named) {
		return Repository{}, fmt.Errorf("repository name %q: must have no tag or digest", s)
	}
	return Repository{Host: reference.Domain(named), Path: reference.Path(named)}, nil
}

// String is the full name: "docker.io/library/busybox:latest".
func (r Reference) String() string {
	s := r.Repository.String()
	if r.Tag != "" {
		s += ":" + r.Tag
	}
	if r.Digest != "" {
		s += "@" + r.Digest.String()
	}
	return s
}

// Familiar is the name as people write it: "busybox:latest".
func (r Reference) Familiar() string {
	s := strings.TrimPrefix(r.String(), "docker.io/")
	return strings.TrimPrefix(s, "library/")
}

// WithDigest names the manifest d in the same repository.
func (r Reference) WithDigest(d digest.Digest) Reference {
	return Reference{Repository: r.Repository, Digest: d}
}

// target is what a manifest's URL ends in.
func (r Reference) target() string {
	if r.Digest != "" {
		return r.Digest.String()
	}
	return r.Tag
}
