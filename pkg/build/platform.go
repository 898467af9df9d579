package build

import (
	"github.com/containerd/platforms"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// targets are the platforms of a build.
type targets struct {
	build ocispec.Platform // where the builder runs
	image ocispec.Platform // what the image is for
	// implicit is set if nobody has asked for a platform. Then the image is for
	// what its base is for.
	implicit bool
}

func newTargets(want *ocispec.Platform) targets {
	t := targets{build: platforms.DefaultSpec()}
	// What the kernel of this machine needs in its version matters to images
	// of other systems only.
	t.build.OSVersion, t.build.OSFeatures = "", nil
	if want == nil {
		t.image, t.implicit = t.build, true
	} else {
		t.image = platforms.Normalize(*want)
	}
	return t
}

// args are the variables that tell a Dockerfile about platforms and target.
func (t targets) args(target string) [][2]string {
	if target == "" {
		target = "default"
	}
	return [][2]string{
		{"BUILDPLATFORM", platforms.Format(t.build)},
		{"BUILDOS", t.build.OS},
		{"BUILDOSVERSION", t.build.OSVersion},
		{"BUILDARCH", t.build.Architecture},
		{"BUILDVARIANT", t.build.Variant},
		{"TARGETPLATFORM", platforms.FormatAll(t.image)},
		{"TARGETOS", t.image.OS},
		{"TARGETOSVERSION", t.image.OSVersion},
		{"TARGETARCH", t.image.Architecture},
		{"TARGETVARIANT", t.image.Variant},
		{"TARGETSTAGE", target},
	}
}

// platformText is a platform with everything that tells it from others.
func platformText(p ocispec.Platform) string { return platforms.FormatAll(platforms.Normalize(p)) }
