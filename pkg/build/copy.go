package build

import (
	"context"
	"errors"
	"fmt"
	"path"
	"strconv"
	"strings"

	"github.com/moby/buildkit/frontend/dockerfile/instructions"
	"github.com/moby/buildkit/util/system"
	"github.com/moby/patternmatcher"
	mode "github.com/tonistiigi/dchapes-mode"

	"github.com/ondol-dev/ondol/pkg/cache"
	"github.com/ondol-dev/ondol/pkg/snapshot"
)

// dispatchCopy copies files from the build context, or from a stage or image.
func (d *dispatcher) dispatchCopy(c *instructions.CopyCommand) error {
	o := &copyOp{name: "COPY", chown: c.Chown, chmod: c.Chmod, link: c.Link, parents: c.Parents, exclude: c.ExcludePatterns}
	if len(d.cmd.sources) > 0 {
		from, err := d.source(0)
		if err != nil {
			return err
		}
		o.from, o.fromStage = from, true
	}
	return d.addCopy(o, c.SourcesAndDest, c.String())
}

// addCopy makes the step of a COPY or ADD.
func (d *dispatcher) addCopy(o *copyOp, params instructions.SourcesAndDest, display string) error {
	if err := o.checkMode(); err != nil {
		return err
	}
	if len(o.exclude) > 0 {
		if _, err := patternmatcher.New(o.exclude); err != nil {
			return fmt.Errorf("invalid exclude patterns %q: %w", o.exclude, err)
		}
	}
	dest, err := absoluteDest(d.state.config.Config.WorkingDir, params.DestPath, d.state.config.OS)
	if err != nil {
		return err
	}
	o.dest = dest
	said := o.name
	for _, flag := range []struct {
		on   bool
		text string
	}{{o.parents, " --parents"}, {o.chown != "", " --chown=" + o.chown}, {o.chmod != "", " --chmod=" + o.chmod}} {
		if flag.on {
			said += flag.text
		}
	}
	for _, src := range params.SourcePaths {
		said += " " + src
		o.paths = append(o.paths, src)
	}
	for _, doc := range params.SourceContents {
		said += " <<" + doc.Path
		o.documents = append(o.documents, doc)
	}
	st := d.addStep(display, o)
	d.commit(said+" "+params.DestPath+" # buildkit", st)
	return nil
}

// absoluteDest is a destination as an absolute path. A slash at its end, which
// says that it is a directory, stays.
func absoluteDest(workdir, dest, os string) (string, error) {
	if dest == "" || dest == "." {
		dest = "./"
	}
	return system.NormalizePath(workdir, dest, os, true)
}

// copyOp is COPY, and what ADD has in common with it.
type copyOp struct {
	name      string
	from      *fileSystem // where paths are looked up, if fromStage is set
	fromStage bool        // else they are in the build context
	paths     []string
	documents []instructions.SourceContent
	dest      string
	chown     string
	chmod     string
	link      bool
	parents   bool
	exclude   []string
	// unpack says that local archives are unpacked.
	unpack bool

	frozen call[*selection]
}

func (o *copyOp) sources() []*fileSystem {
	if o.fromStage && o.from != nil {
		return []*fileSystem{o.from}
	}
	return nil
}

// checkMode finds faults in --chmod before anything is done.
func (o *copyOp) checkMode() error {
	if o.chmod == "" {
		return nil
	}
	_, _, err := parseMode(o.chmod)
	return err
}

// parseMode reads a mode in octal, or a symbolic change of modes.
func parseMode(s string) (*uint32, *mode.Set, error) {
	octal := fmt.Errorf("invalid chmod parameter: '%v'. it should be octal string and between 0 and 07777", s)
	n, err := strconv.ParseUint(s, 8, 32)
	if err == nil {
		if n > 0o7777 {
			return nil, nil, octal
		}
		m := uint32(n)
		return &m, nil, nil
	}
	set, err := mode.ParseWithUmask(s, 0)
	var ne *strconv.NumError
	if errors.As(err, &ne) {
		return nil, nil, octal
	}
	return nil, &set, err
}

// define adds what a copy depends on beside the files that it is made onto:
// of the build context the content of what is copied; of another stage how
// that came about.
func (o *copyOp) define(ctx context.Context, s *solver, r *cache.Recipe) error {
	r.Add("instruction", o.name)
	r.Add("destination", o.dest)
	r.Add("chown", o.chown)
	r.Add("chmod", o.chmod)
	r.Add("options", fmt.Sprintf("parents=%v unpack=%v link=%v", o.parents, o.unpack, o.isLink()))
	for _, e := range o.exclude {
		r.Add("exclude", e)
	}
	for _, doc := range o.documents {
		r.Add("document "+doc.Path, doc.Data)
	}
	if o.fromStage {
		for _, p := range o.paths {
			r.Add("source", p)
		}
		key, err := s.filesKey(ctx, o.from)
		if err != nil {
			return err
		}
		r.Add("from", key)
		return nil
	}
	if len(o.paths) == 0 {
		return nil
	}
	sel, err := o.fromContext(ctx, s)
	if err != nil {
		return err
	}
	digest, err := sel.digest(ctx, false)
	if err != nil {
		return err
	}
	r.Add("files", digest)
	return nil
}

// isLink says whether the copy does not look at the files that it is made
// onto.
func (o *copyOp) isLink() bool { return o.link && o.chmod == "" }

func (o *copyOp) independent() bool { return o.isLink() }

// fromContext returns what the sources select in the build context, read.
func (o *copyOp) fromContext(ctx context.Context, s *solver) (*selection, error) {
	return o.frozen.do(ctx, func() (*selection, error) {
		sel, err := o.selectFrom(s.context.view)
		if err != nil {
			return nil, err
		}
		return sel.freeze(ctx, &s.context.digests)
	})
}

// selectFrom finds what the sources lead to.
func (o *copyOp) selectFrom(v snapshot.View) (*selection, error) {
	var exclude *patternmatcher.PatternMatcher
	if len(o.exclude) > 0 {
		pm, err := patternmatcher.New(o.exclude)
		if err != nil {
			return nil, err
		}
		exclude = pm
	}
	if !o.parents {
		sel, err := selectSources(v, o.paths)
		if err != nil {
			return nil, err
		}
		for i := range sel.items {
			sel.items[i].only.exclude = exclude
		}
		return sel, nil
	}
	all := &selection{view: v}
	for _, p := range o.paths {
		sel, err := selectWithParents(v, p)
		if err != nil {
			return nil, err
		}
		for _, it := range sel.items {
			it.only.exclude = exclude
			all.items = append(all.items, it)
		}
	}
	return all, nil
}

// selectWithParents finds what a source of COPY --parents leads to: the
// directory before "/./", or the root, of which only what the rest of the path
// matches is meant.
func selectWithParents(v snapshot.View, src string) (*selection, error) {
	base, pattern, ok := strings.Cut(src, "/./")
	if !ok {
		base, pattern = "/", src
	}
	pattern = snapshot.Clean(pattern)
	if !hasWildcard(base) && !hasWildcard(pattern) {
		full := path.Join(base, pattern)
		if _, err := selectSources(v, []string{full}); err != nil {
			return nil, err
		}
	}
	sel, err := selectSources(v, []string{base})
	if err != nil {
		return nil, err
	}
	if pattern == "" {
		return sel, nil // all of it
	}
	pm, err := patternmatcher.New([]string{pattern})
	if err != nil {
		return nil, err
	}
	for i := range sel.items {
		sel.items[i].only.include = pm
	}
	return sel, nil
}

func (o *copyOp) run(ctx context.Context, e *execution) (*layer, error) {
	var draft *snapshot.Draft
	var err error
	if o.isLink() {
		draft = snapshot.NewDraft(snapshot.Empty)
	} else if draft, err = e.draft(ctx); err != nil {
		return nil, err
	}
	c, err := o.copier(ctx, draft, e.now)
	if err != nil {
		return nil, err
	}
	if len(o.paths) > 0 {
		sel, err := o.selection(ctx, e)
		if err != nil {
			return nil, err
		}
		if err := o.copyTo(ctx, e, c, sel); err != nil {
			return nil, err
		}
	}
	for _, doc := range o.documents {
		name := snapshot.Clean(doc.Path)
		v := snapshot.NewMemView(map[string]snapshot.MemFile{name: {Content: doc.Data, Mode: 0o644, ModTime: e.now}})
		sel, err := selectSources(v, []string{name})
		if err != nil {
			return nil, err
		}
		if err := c.copy(ctx, sel, o.dest); err != nil {
			return nil, err
		}
	}
	return e.write(ctx, draft)
}

func (o *copyOp) copier(ctx context.Context, draft *snapshot.Draft, now int64) (*copier, error) {
	c := &copier{draft: draft, now: now}
	if o.chown != "" {
		own, err := lookUpOwner(ctx, draft, o.chown)
		if err != nil {
			return nil, err
		}
		c.owner = &own
	}
	if o.chmod != "" {
		var err error
		if c.mode, c.symbolic, err = parseMode(o.chmod); err != nil {
			return nil, err
		}
	}
	return c, nil
}

// selection returns what is to be copied. Files of the build context belong to
// root.
func (o *copyOp) selection(ctx context.Context, e *execution) (*selection, error) {
	if !o.fromStage {
		sel, err := o.fromContext(ctx, e.solver)
		if err != nil {
			return nil, err
		}
		owned := &selection{view: rootOwned{sel.view}}
		for _, it := range sel.items {
			it.entry.UID, it.entry.GID = 0, 0
			owned.items = append(owned.items, it)
		}
		return owned, nil
	}
	v, err := e.solver.view(ctx, o.from)
	if err != nil {
		return nil, err
	}
	return o.selectFrom(v)
}

// copyTo copies the selection, or unpacks what of it are archives.
func (o *copyOp) copyTo(ctx context.Context, e *execution, c *copier, sel *selection) error {
	for _, it := range sel.items {
		if o.unpack && it.entry.Type == snapshot.File {
			done, err := c.unpackArchive(ctx, e, sel.view, it.entry, o.dest)
			if err != nil {
				return err
			}
			if done {
				continue
			}
		}
		if err := c.copyItem(ctx, sel.view, it, o.dest); err != nil {
			return err
		}
	}
	return nil
}

// rootOwned is a view in which everything belongs to root: who owns a file on
// the machine of the builder means nothing in an image.
type rootOwned struct{ snapshot.View }

func (v rootOwned) Lstat(path string) (snapshot.Entry, error) {
	e, err := v.View.Lstat(path)
	e.UID, e.GID = 0, 0
	return e, err
}

func (v rootOwned) ReadDir(path string) ([]snapshot.Entry, error) {
	entries, err := v.View.ReadDir(path)
	for i := range entries {
		entries[i].UID, entries[i].GID = 0, 0
	}
	return entries, err
}
