package build_test

import (
	"context"
	"fmt"
	"log"
	"os"
	"path/filepath"

	"github.com/ondol-dev/ondol/pkg/build"
	"github.com/ondol-dev/ondol/pkg/cache"
)

// Another Go program builds an image.
func Example() {
	build.Init() // first in main

	dir, err := os.MkdirTemp("", "")
	if err != nil {
		log.Fatal(err)
	}
	defer os.RemoveAll(dir)
	if err := os.WriteFile(filepath.Join(dir, "hello.txt"), []byte("hello\n"), 0o644); err != nil {
		log.Fatal(err)
	}

	volume, err := cache.OpenDisk(filepath.Join(dir, "volume"))
	if err != nil {
		log.Fatal(err)
	}
	defer volume.Close()
	builder, err := build.New(build.Options{Volume: volume})
	if err != nil {
		log.Fatal(err)
	}
	img, err := builder.Build(context.Background(), build.Request{
		Context:    dir,
		Dockerfile: "Dockerfile",
		Content:    []byte("FROM scratch\nCOPY hello.txt /\nCMD [\"/hello.txt\"]\n"),
		Export: func(ctx context.Context, img *build.Image) error {
			name, err := build.ParseReference("example.com/hello:1")
			if err != nil {
				return err
			}
			return img.WriteLayout(ctx, filepath.Join(dir, "image"), name) // or img.Push(ctx, name)
		},
	})
	if err != nil {
		log.Fatal(err)
	}
	fmt.Println(img.Descriptor.MediaType, len(img.Steps))
	// Output: application/vnd.oci.image.manifest.v1+json 1
}
