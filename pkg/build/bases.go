package build

import (
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// BaseImages returns the names of all images that a Dockerfile starts from or
// takes files from, each once, whatever the target: what a node should have
// before it builds it.
func BaseImages(name string, content []byte, buildArgs map[string]string, platform *ocispec.Platform) ([]string, error) {
	file, err := parseDockerfile(name, content, func(int, string) {})
	if err != nil {
		return nil, err
	}
	p, err := newPlan(file, &Request{Dockerfile: name, Content: content, BuildArgs: buildArgs, Platform: platform})
	if err != nil {
		return nil, file.named(err)
	}
	var out []string
	seen := map[string]bool{scratch: true}
	for _, st := range p.stages {
		if st.from == nil && !seen[st.base] {
			seen[st.base] = true
			out = append(out, st.base)
		}
	}
	return out, nil
}
