package cli

import (
	"fmt"
	"strings"

	"github.com/spf13/pflag"

	"github.com/ondol-dev/ondol/internal/registry"
)

// RegistryFlags are the flags that say how registries are reached. Their names
// and meaning are Kaniko's.
type RegistryFlags struct {
	insecure, insecurePull         bool
	skipVerify, skipVerifyPull     bool
	insecureHosts, skipVerifyHosts []string
	certificates, clientCerts      []string
	pullRetries, pushRetries       int
}

// RegisterPull adds the flags for pulling.
func (f *RegistryFlags) RegisterPull(fs *pflag.FlagSet) {
	fs.BoolVar(&f.insecurePull, "insecure-pull", false, "allow plain http for pulling, where TLS does not work")
	fs.BoolVar(&f.skipVerifyPull, "skip-tls-verify-pull", false, "do not verify certificates when pulling")
	fs.StringArrayVar(&f.insecureHosts, "insecure-registry", nil, "allow plain http for this registry (can be repeated)")
	fs.StringArrayVar(&f.skipVerifyHosts, "skip-tls-verify-registry", nil, "do not verify the certificate of this registry (can be repeated)")
	fs.StringArrayVar(&f.certificates, "registry-certificate", nil, "trust the authorities in a file for a registry: HOST=FILE (can be repeated)")
	fs.StringArrayVar(&f.clientCerts, "registry-client-cert", nil, "show a certificate to a registry: HOST=CERT,KEY (can be repeated)")
	fs.IntVar(&f.pullRetries, "image-download-retry", 4, "how often to repeat a request that failed when pulling")
}

// RegisterPush adds the flags for pushing.
func (f *RegistryFlags) RegisterPush(fs *pflag.FlagSet) {
	fs.BoolVar(&f.insecure, "insecure", false, "allow plain http for pushing and for the cache, where TLS does not work")
	fs.BoolVar(&f.skipVerify, "skip-tls-verify", false, "do not verify certificates when pushing and for the cache")
	fs.IntVar(&f.pushRetries, "push-retry", 4, "how often to repeat a request that failed when pushing")
}

// Pull returns the client for pulling.
func (f *RegistryFlags) Pull() (*registry.Client, error) {
	return f.client(f.insecurePull, f.skipVerifyPull, f.pullRetries)
}

// Push returns the client for pushing and for the cache.
func (f *RegistryFlags) Push() (*registry.Client, error) {
	return f.client(f.insecure, f.skipVerify, f.pushRetries)
}

func (f *RegistryFlags) client(insecure, skipVerify bool, retries int) (*registry.Client, error) {
	o := registry.Options{
		PlainHTTP: insecure, PlainHTTPHosts: f.insecureHosts, SkipVerify: skipVerify, SkipVerifyHosts: f.skipVerifyHosts,
		Certificates: map[string]string{}, ClientCertificates: map[string][2]string{}, UserAgent: "ondol/" + Version, Retries: retries,
	}
	if retries == 0 {
		o.Retries = -1
	}
	for _, s := range f.certificates {
		host, file, ok := strings.Cut(s, "=")
		if !ok {
			return nil, fmt.Errorf("--registry-certificate %s: must be HOST=FILE", s)
		}
		o.Certificates[host] = file
	}
	for _, s := range f.clientCerts {
		host, files, ok := strings.Cut(s, "=")
		cert, key, ok2 := strings.Cut(files, ",")
		if !ok || !ok2 {
			return nil, fmt.Errorf("--registry-client-cert %s: must be HOST=CERT,KEY", s)
		}
		o.ClientCertificates[host] = [2]string{cert, key}
	}
	return registry.NewClient(o)
}
