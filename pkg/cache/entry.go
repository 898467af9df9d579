package cache

import (
	"fmt"
	"time"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// An Entry says what a step has produced: one layer.
type Entry struct {
	Key Key `json:"key"`
	// Layer describes the layer's blob.
	Layer ocispec.Descriptor `json:"layer"`
	// DiffID is the digest of the layer's tar.
	DiffID digest.Digest `json:"diffID"`
	// Parent is the chain ID of the layers on which the step was run, "" for
	// none. Keys speak of definitions, and the same definition can have given
	// different layers at different times: an entry may be used only on top of
	// the very layers that it was made on.
	Parent digest.Digest `json:"parent,omitempty"`
	// Created is when the step had ended. It goes into the image's history, so
	// that an image built from the cache is equal to the first one.
	Created time.Time `json:"created"`
	// Seconds is how long the step has taken.
	Seconds float64 `json:"seconds,omitempty"`
	// Recipe holds what the key was made of.
	Recipe []Component `json:"recipe,omitempty"`
}

// validate refuses entries that cannot be used, whoever wrote them.
func (e *Entry) validate() error {
	if err := e.Layer.Digest.Validate(); err != nil {
		return fmt.Errorf("entry %s: layer: %w", e.Key, err)
	}
	if err := e.DiffID.Validate(); err != nil {
		return fmt.Errorf("entry %s: diff ID: %w", e.Key, err)
	}
	if e.Layer.Size <= 0 {
		return fmt.Errorf("entry %s: layer has %d bytes", e.Key, e.Layer.Size)
	}
	return nil
}

// ChainID names a stack of layers by the digest of its definition in the OCI
// image specification: that of one layer is its diff ID, and that of more is
// the digest of the chain below and the diff ID on top. "" is no layer.
func ChainID(diffIDs ...digest.Digest) digest.Digest {
	var chain digest.Digest
	for _, d := range diffIDs {
		if chain == "" {
			chain = d
			continue
		}
		chain = digest.FromString(string(chain) + " " + string(d))
	}
	return chain
}

// ChainOf is the ChainID of layers, lowest first.
func ChainOf(layers []Layer) digest.Digest {
	ids := make([]digest.Digest, len(layers))
	for i, l := range layers {
		ids[i] = l.DiffID
	}
	return ChainID(ids...)
}
